"""The networks that people use, on zfcore: which paths they take, whether the answers are right, how long they take.

    python bench/zoo.py --what read --out out/zoo.jsonl           every network's paths, in some minutes
    python bench/zoo.py --only resnet18 vgg --what read,exact,speed
    python bench/zoo.py --table out/zoo.jsonl                      the tables of a run, as Markdown

Networks run in a process of their own, which is begun anew when one of them kills it or takes too long; that is a
result like others. Libraries that are not installed are left out, and said to be.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import zoo_tables

WHAT = ("read", "exact", "speed")
LIMITS = {"read": 60.0, "exact": 240.0, "speed": 600.0}  # seconds a network may take
STARTING = 120.0  # seconds that a process may take until it is there
ENDING = 10.0  # that it may take to end
TRACE_LINES = 8  # kept of what Python says when it is killed


def load_networks(file: Path) -> dict:
    """The NETWORKS of a Python file, by key."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {network.key: network for network in module.NETWORKS}


def chosen(keys: Iterable[str], words: Sequence[str] | None) -> list[str]:
    """The keys that hold one of the words, or all of them."""
    return [key for key in keys if not words or any(word in key for word in words)]


def load_records(file: Path) -> dict[str, dict]:
    """The records of a file by key; what was found of one network in several runs is put together, the latest last."""
    records: dict[str, dict] = {}
    if file.exists():
        for line in file.read_text().splitlines():
            new = json.loads(line)
            old = records.get(new["key"], {})
            what = [*old.get("what", []), *(each for each in new["what"] if each not in old.get("what", []))]
            records[new["key"]] = {**old, **new, "what": what}
    return records


# ---- processes


def work(connection: Connection, file: Path, threads: int, trace: Path) -> None:
    """What a process does: it is sent (key, stages) and sends facts, then None."""
    with trace.open("w") as dump:
        faulthandler.enable(dump)
        import torch
        from zoo_checks import examine

        torch.set_num_threads(threads)
        networks = load_networks(file)
        connection.send({})
        while True:
            try:
                key, what = connection.recv()
            except EOFError:  # nobody has anything more to send
                return
            examine(networks[key], what, lambda **facts: connection.send(facts))
            connection.send(None)


class Worker:
    """A process that networks are sent to, one after the other, and another one when it is gone."""

    def __init__(self, file: Path, threads: int, folder: Path):
        self.arguments = file, threads, folder / "trace"
        self.process: multiprocessing.Process | None = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        if not self.connection.poll(STARTING):
            raise RuntimeError(f"the process of the networks was not there after {STARTING:.0f} s")
        self.connection.recv()

    def stop(self, patience: float = 0.0) -> None:
        """patience: seconds that it may take to end by itself, as it does once it is done and nothing more comes."""
        if self.process is None:
            return
        self.connection.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        self.process = None

    def examine(self, key: str, what: Sequence[str], limit: float) -> dict:
        """What was found of a network. status: "done", or why not all was looked at."""
        if self.process is None or not self.process.is_alive():
            self.stop()
            self.start()
        record: dict = {"step": "start"}
        end = time.monotonic() + limit
        self.connection.send((key, tuple(what)))
        while True:
            if not self.connection.poll(max(0.0, end - time.monotonic())):
                self.stop()
                return {**record, "status": "too long", "error": f"more than {limit:.0f} s"}
            try:
                facts = self.connection.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                error, where = ended(self.process.exitcode), self.trace()
                self.stop()
                return {**record, "status": "killed", "error": error, "where": where}
            if facts is None:
                return record
            record |= facts

    def trace(self) -> list[str]:
        """Where Python was when it was killed, innermost first."""
        _, _, dump = self.arguments[2].read_text().rpartition("Current thread")
        own = dump.partition("\nThread ")[0]
        places = [line.strip() for line in own.splitlines() if line.lstrip().startswith("File ")]
        return [place.rpartition("site-packages/")[2].removeprefix('File "') for place in places[:TRACE_LINES]]


def ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def run(
    keys: Sequence[str], what: Sequence[str], worker: Worker, limit: float, tell: Callable[[str, dict], None]
) -> None:
    try:
        for key in keys:
            tell(key, worker.examine(key, what, limit))
        worker.stop(ENDING)
    finally:
        worker.stop()


# ---- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="networks whose library/family/name holds a word")
    parser.add_argument("--what", default="read", help=f"some of {','.join(WHAT)} (read)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--out", type=Path, help="a line of JSON for each network; without it, only the tables")
    parser.add_argument("--resume", action="store_true", help="go on with --out: leave out what was tried")
    parser.add_argument("--limit-s", type=float, help="seconds that a network may take (60, 240 and 600 for the three)")
    parser.add_argument("--table", type=Path, metavar="JSONL", help="run nothing: the tables of an earlier run")
    parser.add_argument("--list", action="store_true", help="run nothing: the names of the networks")
    parser.add_argument(
        "--networks", type=Path, default=Path(__file__).with_name("zoo_networks.py"), metavar="FILE",
        help="a Python file with NETWORKS of its own, as zoo_networks.py has them",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.what = [each for each in WHAT if each in options.what.split(",")] or parser.error("--what: nothing known")
    if options.resume and not options.out:
        parser.error("--resume: expected --out, a run to go on with")
    return options


def line(key: str, record: dict) -> str:
    """What a run prints of a network."""
    paths = [f"{name} {record[f'{name}_path']}" for name in ("mid", "late", "occlusion") if f"{name}_path" in record]
    problem = ""
    if record["status"] != "done":
        problem = f"{record['status'].upper()} at {record['step']}: {record['error'][:150]}"
    errors = [f"{name} {record[name]:.1e}" for name in zoo_tables.ERRORS if name in record]
    ratios = [f"{name} {record[name]:.2f}" for name in zoo_tables.RATIOS if name in record]
    return "  ".join(filter(None, [key, *paths, *errors, *ratios, problem]))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        print("\n".join(zoo_tables.page(list(load_records(options.table).values()))))
        return
    networks = load_networks(options.networks)
    keys = chosen(networks, options.only)
    if options.list:
        print("\n".join(keys))
        return
    records = load_records(options.out) if options.resume else {}
    keys = [key for key in keys if not set(options.what) <= set(records.get(key, {}).get("what", []))]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            options.out.write_text("")

    def tell(key, found):
        network = networks[key]
        facts = {"library": network.library, "family": network.family, "name": network.name, "shape": network.shape}
        record = {"key": key, **facts, "what": options.what, **found}
        records[key] = {**records.get(key, {}), **record}
        print(line(key, record), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the networks' process ends too
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(options.networks.resolve(), options.threads, Path(folder))
        limit = options.limit_s or sum(LIMITS[each] for each in options.what)
        run(keys, options.what, worker, limit, tell)
    print("\n".join(["", *zoo_tables.page(list(records.values()))]))


if __name__ == "__main__":
    main()
