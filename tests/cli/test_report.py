"""Figures show the numbers they are given; the page is inert; writes stay in their folder."""

import base64
import errno
import hashlib
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from zfcore.errors import ArgumentError
from zfcore.occlusion import Occlusion
from zfcore.report import colour, drawing, figures
from zfcore.report.files import OutputFolder, safe_name
from zfcore.report.page import Entry, Figure, Table, render_page

# ---- colours ---------------------------------------------------------------------------------------------


def lightness(rgb):
    """CIE L* of uint8 sRGB, another measure of lightness than the one the maps are made with."""
    linear = rgb / 255.0
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return 116 * np.cbrt(y) - 16


def test_sequential_colours_are_ordered_by_lightness():
    ramp = lightness(colour.coloured(np.linspace(0, 1, 64)))
    steps = np.diff(ramp)
    assert (steps > 0).all() and ramp[0] < 12 and ramp[-1] > 90
    assert steps.max() < 3 * steps.mean()  # no jump that looks like an edge in the data


def test_diverging_colours_are_lightest_at_zero_and_differ_in_hue():
    colours = colour.coloured(np.linspace(-1, 1, 129), colour.DIVERGING)
    ramp = lightness(colours)
    assert ramp.argmax() in (63, 64, 65)
    assert (np.diff(ramp[:60]) > 0).all() and (np.diff(ramp[70:]) < 0).all()
    assert colours[0, 2] > colours[0, 0] and colours[-1, 0] > colours[-1, 2]  # blue below, red above


def test_colours_out_of_range_and_nan():
    colours = colour.coloured(np.array([-3.0, 0.0, 1.0, 9.0, np.nan, np.inf]))
    assert (colours[0] == colours[1]).all() and (colours[2] == colours[3]).all()
    assert (colours[4] == 128).all() and (colours[5] == colours[2]).all()


def test_class_colours_can_be_told_apart():
    colours = colour.categorical(12).astype(int)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(12, dtype=int)
    assert distances.min() > 40


# ---- figures ---------------------------------------------------------------------------------------------


def test_projection_contrast_is_about_mid_grey():
    p = torch.zeros(3, 20, 20)
    p[:, 4, 5:7], p[:, 8, 9] = 4.0, -2.0
    array = drawing.projection_picture(p)
    assert array[4, 5].tolist() == [255] * 3 and array[8, 9].tolist() == [64] * 3
    assert array[0, 0].tolist() == [128] * 3
    assert (drawing.projection_picture(7 * p) == array).all()  # each projection's own contrast
    assert (drawing.projection_picture(torch.zeros(1, 5, 5)) == 128).all()
    assert drawing.projection_picture(torch.full((1, 5, 5), torch.nan)).shape == (5, 5, 3)
    assert drawing.projection_picture(torch.zeros(1, 1, 1) + 3).tolist() == [[[255] * 3]]


def test_small_pictures_are_enlarged_by_whole_factors():
    array = np.random.default_rng(0).integers(0, 255, (7, 5, 3), dtype=np.uint8)
    big = np.asarray(drawing.enlarged(array, 100))
    assert big.shape == (98, 70, 3)
    assert (big == np.kron(array, np.ones((14, 14, 1), np.uint8))).all()
    assert drawing.enlarged(np.zeros((300, 10, 3), np.uint8), 100).size == (3, 100)
    assert drawing.enlarged(np.zeros((2000, 1, 3), np.uint8), 100).size == (1, 100)


def layer(name="conv1", units=3, size=5, picture=(28, 28)):
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(-2, max(picture[0] - size, 0) + 2, (units, 2), generator=generator)
    return figures.LayerProjections(
        name,
        list(range(units)),
        16,
        torch.rand(units, generator=generator).tolist(),
        torch.randn(units, 1, size, size, generator=generator),
        torch.cat([corner, corner + size], 1).tolist(),
    )


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 28, 28), (3, 224, 160), (3, 40, 300)])
def test_projection_figure_of_any_picture(shape):
    picture = torch.rand(shape)
    layers = [layer(size=5), layer("features.10", 9, 17), layer("whole", 2, 400), layer("one", 1, 1)]
    image = figures.projection_figure(picture, layers, title="a picture", classes=[("A", 0.9), ("B", 0.1)])
    assert image.mode == "RGB" and image.width >= 1100 and image.height > 600
    empty = figures.projection_figure(picture, [], title="no layers")
    assert empty.height < image.height
    none = figures.LayerProjections("dead", [], 16, [], torch.zeros(0, 1, 0, 0), [])
    assert figures.projection_figure(picture, [none], title="no active unit").height > empty.height


def find(image, pattern):
    """Is the array `pattern` somewhere in the image?"""
    array = np.asarray(image)
    height, width = pattern.shape[:2]
    ys, xs = np.nonzero((array[: -height + 1, : -width + 1] == pattern[0, 0]).all(-1))
    return any((array[y : y + height, x : x + width] == pattern).all() for y, x in zip(ys, xs, strict=True))


def test_projection_figure_shows_the_projection_the_patch_and_the_picture():
    picture = torch.rand(1, 28, 28)
    projections = layer()
    projections.boxes[0][:] = [3, 4, 8, 9]
    image = figures.projection_figure(picture, [projections], title="t")
    shown = drawing.rgb_array(picture)
    side = 112 // 5
    tile = np.ones((side, side, 1), np.uint8)
    assert find(image, np.kron(drawing.projection_picture(projections.pixels[0]), tile))
    assert find(image, np.kron(shown[3:8, 4:9], tile))
    whole = layer("whole", 1, 40)
    whole.boxes[0][:] = [-6, -6, 34, 34]
    image = figures.projection_figure(picture, [whole], title="t")
    inside = drawing.projection_picture(whole.pixels[0])[6:34, 6:34]
    assert find(image, np.kron(inside, np.ones((4, 4, 1), np.uint8)))


def occlusion(size=(28, 28), grid=(6, 8), classes=4, activation=True):
    generator = torch.Generator().manual_seed(0)
    gy, gx = grid
    box = [size[0] // gy + 1, size[1] // gx + 1]
    y = torch.arange(gy)[:, None].expand(gy, gx) * (size[0] // gy)
    x = torch.arange(gx)[None].expand(gy, gx) * (size[1] // gx)
    boxes = torch.stack([y, x, (y + box[0]).clamp(max=size[0]), (x + box[1]).clamp(max=size[1])], -1)
    values = torch.rand(2, gy, gx, generator=generator)
    return Occlusion(
        scores=values, labels=(values * classes).long(), activation=values * 30 if activation else None,
        clean=torch.tensor([0.9, 0.8]), boxes=boxes, clean_labels=torch.tensor([1, 2]),
        targets=torch.tensor([1, 2]), clean_activation=torch.tensor([20.0, 21.0]) if activation else None,
        units=torch.tensor([3, 3]) if activation else None, image_size=size,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(28, 28), (224, 224), (60, 30), (20, 90)])
@pytest.mark.parametrize("activation", [True, False])
def test_occlusion_figure_of_any_picture(size, activation):
    o = occlusion(size, activation=activation)
    feature = (
        figures.FeatureProjection("conv5", 3, torch.randn(3, *size), (2, 3, 9, 9)) if activation else None
    )
    image = figures.occlusion_figure(
        torch.rand(3, *size), o, 1, title="t", class_names=["A", "B"], score="logit", feature=feature
    )
    assert image.size[0] == (1196 if activation else 808)


def test_occlusion_figure_of_a_callable_score_and_of_nothing_finite():
    o = Occlusion(**{**vars(occlusion()), "labels": None, "clean_labels": None, "targets": None})
    figures.occlusion_figure(torch.rand(1, 28, 28), o, title="t", score="callable")
    o = Occlusion(**{**vars(occlusion()), "scores": torch.full((2, 6, 8), torch.nan)})
    figures.occlusion_figure(torch.rand(1, 28, 28), o, title="t")
    flat = Occlusion(**{**vars(occlusion()), "scores": torch.full((2, 6, 8), 0.9)})
    figures.occlusion_figure(torch.rand(1, 28, 28), flat, title="t")


def test_occlusion_maps_show_the_nearest_box():
    o = occlusion((28, 28), (4, 7))
    view = figures._View(o, 0, (280, 280))
    colours = np.arange(4 * 7 * 3, dtype=np.uint8).reshape(4, 7, 3)
    cells = np.asarray(view.cells(colours))
    for row in range(4):
        for column in range(7):
            y0, x0, y1, x1 = o.boxes[row, column].tolist()
            assert (cells[5 * (y0 + y1), 5 * (x0 + x1)] == colours[row, column]).all()


def test_class_legend_names_the_clean_answer_first_and_sums_up_the_rest():
    labels = np.array([[5, 5, 5, 2], [0, 1, 3, 4], [6, 7, 8, 9]])
    palette, entries = figures._classes(labels, ["zero", "one", "two"], clean=2)
    assert entries[0][1] == "two  8.3 %" and entries[1][1] == "class 5  25.0 %"
    assert len(entries) == 7 and entries[-1][1] == "4 others  33.3 %"
    assert len({tuple(palette[label]) for label in (2, 5, 0)}) == 3


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"), (1.23456, "1.23"), (0.0123456, "0.0123"), (123.456, "123"), (99999, "99999"),
        (1234567, "1.23e+06"), (1e-9, "1.00e-09"), (-12.34, "-12.3"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert figures.number(value) == text


@pytest.mark.parametrize(
    "share, text", [(0, "0.0 %"), (1, "100.0 %"), (0.5, "50.0 %"), (1e-7, "<0.1 %"), (0.99999, ">99.9 %")]
)
def test_percent(share, text):
    assert figures.percent(share) == text


@pytest.mark.parametrize(
    "low, high, texts",
    [
        (335.001, 335.042, ["335.0010", "335.0215", "335.0420"]),
        (14.7, 29.1, ["14.7", "21.9", "29.1"]),
        (-3000, 52000, ["-3000", "24500", "52000"]),
        (1e-9, 3e-9, ["1.00e-09", "2.00e-09", "3.00e-09"]),
        (2, 2, ["2.00"]),
    ],
)
def test_legends_tell_their_ends_apart(low, high, texts):
    assert [text for _, text in figures._ticks(low, high)] == texts


@pytest.mark.parametrize(
    "highest, end", [(0.99, 1), (0.5, 0.5), (0.3, 0.5), (0.011, 0.02), (0, 1e-6), (7, 1)]
)
def test_the_scale_of_small_probabilities_is_small(highest, end):
    assert figures._round_share(highest) == pytest.approx(end)


def test_drops_are_signed():
    assert figures._signed(0.313, True) == "+31.3 points"
    assert figures._signed(-0.000123, True) == "−0.0123 points"
    assert figures._signed(-2.5, False) == "−2.50" and figures._signed(0.0, False) == "0"


def test_text_of_any_kind_can_be_drawn():
    for text in ("", "a" * 3000, "日本語.png", "e\u202egnp.exe", "\x00\x1b[31m\n", "\udcff\udc80", "🙂" * 50):
        figures.projection_figure(torch.rand(1, 8, 8), [], title=text, subtitle=text, classes=[(text, 0.5)])


# ---- the page --------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style><script>",
    "</title><script>alert(1)</script>",
    "]]><script>",
    "<!--",
    "-->",
    "&lt;script&gt;",
    "&#60;script&#62;",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "{{7*7}}",
    "${7*7}",
    "<a href='//evil'>",
    "\u202egnp.exe",
    "\u2066<b>\u2069",
    "a\x00b",
    "a\nb\rc",
    "\x1b]0;owned\x07",
    "\udcff\udcfe.png",
    "'\"`",
    "<base href=//evil>",
    "<meta http-equiv=refresh content=0;url=//evil>",
    "<iframe src=//evil>",
    "\ufeff<",
    "<style>*{background:url(//evil)}</style>",
    "<link rel=stylesheet href=//evil>",
    "\u2028\u2029",
    "<!DOCTYPE",
]
NAMES = [f"{a}{b}" for a in HOSTILE for b in ("", ".png", '"', " x")]
NAMES += [f"{a}{b}" for a, b in zip(HOSTILE, HOSTILE[1:], strict=False)]
NAMES += [f"/{a}/../{a}" for a in HOSTILE] + [a.upper() for a in HOSTILE]

TAGS = set(
    "html head meta title style body header p h1 h2 ul li b nav ol a main section article figure img "
    "figcaption details summary div table thead tbody tr th td dl dt dd".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv content name class id href src alt width height scope aria-label".split()
)


class Reader(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.elements, self.words, self.strange = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def handle_comment(self, data):
        self.strange.append(data)

    unknown_decl = handle_pi = handle_comment


def hostile_page(names=NAMES):
    entries = [
        Entry(name, name, [Figure(name, b"png", (3, 4), name), Figure(name, None, (3, 4), name)],
              [Table(name, (name, name), [(name, name)])], [name])
        for name in names
    ]  # fmt: skip
    pairs = [(name, name) for name in names]
    return render_page(names[0], names[1], entries, pairs, pairs, pairs)


def test_hostile_names_are_only_text():
    assert len(NAMES) >= 200
    page = hostile_page()
    reader = Reader(page)
    assert {tag for tag, _ in reader.elements} <= TAGS
    assert not reader.strange
    for tag, attributes in reader.elements:
        assert set(attributes) <= ATTRIBUTES, (tag, attributes)
        assert "http-equiv" not in attributes or attributes["http-equiv"] == "Content-Security-Policy"
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
    assert sum(tag == "style" for tag, _ in reader.elements) == 1
    assert sum(tag == "article" for tag, _ in reader.elements) == len(NAMES)
    for name in ("<script>alert(1)</script>", "</style><script>", "&lt;script&gt;"):
        assert name in reader.words  # shown as it is called
    page.encode()  # no lone surrogates
    assert not set(page) & set("\x00\x1b\u202e\u2066")


def test_links_only_lead_into_the_page_and_the_folder():
    page = render_page("t", "l", [Entry("a", "s", [Figure("0001-a.png", b"p", (1, 1), "alt")])] * 2, [])
    hrefs = {attributes["href"] for tag, attributes in Reader(page).elements if tag == "a"}
    assert hrefs == {"#picture-1", "#picture-2", "0001-a.png"}


def test_the_policy_allows_the_pages_own_style_and_pictures_and_nothing_else():
    page = hostile_page()
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert "style=" not in page and "<script" not in page
    plain = hostile_page(["a", "b"])
    assert not re.search(
        r"(?:src|url|href)\s*[=(]\s*[\"']?(?:https?:)?//", plain
    ) and "http" not in plain.replace("http-equiv", "")


def test_a_browser_runs_nothing_of_a_hostile_page(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    path = tmp_path / "index.html"
    script = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    path.write_text(hostile_page([*HOSTILE, script]), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile")
    run = subprocess.run([browser, *options, "--dump-dom", path.as_uri()], capture_output=True, timeout=60)
    tree = run.stdout.decode(errors="replace")
    assert "How this was made" in tree, run.stderr[-500:]
    tree = re.sub(r"<style>.*?</style>", "", tree, flags=re.S)
    assert "<title>owned</title>" not in tree and "<script" not in tree


def test_figures_past_the_budget_are_linked():
    page = render_page(
        "t", "l", [Entry("a", "s", [Figure("0001-a.png", None, (1, 1), "Projections of a.")])], []
    )
    assert "<img" not in page and '<a href="0001-a.png">' in page and "beside this page" in page


# ---- writing ---------------------------------------------------------------------------------------------

STRANGE_PATHS = [
    "../../etc/passwd", "/etc/passwd", "..", ".", "", "/", "a/../../b.png", "a\x00b.png", "x" * 255,
    "é" * 255, "CON.png", "nul", "a.png/", "-rf", "~/x", "$HOME", "`id`", "a;b", "a b\tc\nd", "日本語.png",
    "\udcff.png", ".hidden", "...", "a" * 3000 + ".png", "IMG.PNG", "img.png",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["project", "occlude"])
@pytest.mark.parametrize("index", [1, 9999, 123456])
def test_names_are_safe_whatever_the_input_is_called(index, kind):
    for path in STRANGE_PATHS + NAMES:
        name = safe_name(index, path, kind)
        assert re.fullmatch(r"[0-9]{4,}(-[a-z0-9]+)*-(project|occlude)\.png", name), name
        assert len(name) < 100


def test_names_that_fold_together_stay_apart():
    names = [
        safe_name(i, path, "project").lower() for i, path in enumerate(["A.png", "a.png", "a.PNG", "á.png"])
    ]
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "a/b.png", "", ".", "..", ".a", "a\x00.png", "a\n", "-a", "a b", "é.png"]
)
def test_only_plain_names_are_written(tmp_path, name):
    with OutputFolder(tmp_path / "out") as folder, pytest.raises(ArgumentError, match="name"):
        folder.write(name, b"x")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


def test_planted_links_are_replaced_and_not_followed(tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir(), outside.mkdir()
    (outside / "precious").write_text("kept")
    (out / "index.html").symlink_to(outside / "precious")
    (out / "new.png").symlink_to(outside / "not-there")
    (out / "loop.png").symlink_to(out / "loop.png")
    os.link(outside / "precious", out / "hard.png")
    with OutputFolder(out) as folder:
        for name in ("index.html", "new.png", "loop.png", "hard.png"):
            folder.write(name, b"ours")
            assert not (out / name).is_symlink() and (out / name).read_bytes() == b"ours"
    assert (outside / "precious").read_text() == "kept" and os.listdir(outside) == ["precious"]


def test_a_folder_that_is_swapped_while_writing_keeps_its_files(tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out").rename(tmp_path / "moved")
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
        folder.write("a.png", b"x")
    assert os.listdir(tmp_path / "elsewhere") == [] and os.listdir(tmp_path / "moved") == ["a.png"]


def test_a_folder_in_the_place_of_a_file_is_an_error(tmp_path):
    with OutputFolder(tmp_path) as folder:
        (tmp_path / "index.html").mkdir()
        with pytest.raises(OSError):
            folder.write("index.html", b"x")
    assert os.listdir(tmp_path) == ["index.html"]  # nothing temporary is left


@pytest.mark.parametrize("make", [lambda p: p.write_text("a file"), lambda p: p.symlink_to(p)])
def test_what_cannot_be_a_folder_is_refused(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(ArgumentError, match="out: .*expected a folder"):
        OutputFolder(tmp_path / "out")
    with pytest.raises(ArgumentError, match="out"):
        OutputFolder("a\0b")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, call, code):
    with OutputFolder(tmp_path) as folder:
        folder.write("index.html", b"old")

        def fail(*_args, **_options):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError) as caught:
            folder.write("index.html", b"new and longer")
        monkeypatch.undo()
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == ["index.html"]
    assert (tmp_path / "index.html").read_bytes() == b"old"


def test_files_get_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        with OutputFolder(tmp_path) as folder:
            folder.write("a.png", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o644


def test_figures_are_pngs_that_open(tmp_path):
    image = figures.projection_figure(torch.rand(1, 28, 28), [layer()], title="t")
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == image.size
