"""Runs the kernels' bodies on samples, under a sanitizer: python sanitized.py LIBRARY [planted]

"planted" tells a body of rows that lie past its memory: the sanitizer must end the process.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "ops")]

import cases  # noqa: E402
import samples  # noqa: E402
import torch  # noqa: E402
from driver import Driver, view  # noqa: E402

driver = Driver(Path(sys.argv[1]))
if "planted" in sys.argv:
    x, switches = torch.zeros(1, 1, 8, 6), torch.zeros(1, 1, 4, 3, dtype=torch.uint8)
    y = torch.zeros(1, 1, 4, 3)
    wrong = view(x)
    wrong.stride[2] = x.numel()  # the second row lies past the end
    driver.pool_views(wrong, view(y), view(switches), ((2, 2), (2, 2), (0, 0), (1, 1)))
    sys.exit("the planted read past the map was not caught")

for sample in [*samples.table(150, seed=7), *cases.known_samples()]:
    cases.check_pool(driver, sample)
    cases.check_gather(driver, sample, sample.overlap)
    for size in cases.unpooled_sizes(sample):
        cases.check_unpool(driver, sample, size, True, sample.overlap)
for seed in range(60):
    dtype, layout = samples.DTYPES[seed % len(samples.DTYPES)], samples.LAYOUTS[seed % len(samples.LAYOUTS)]
    cases.check_paste(driver, *cases.pasted(seed, dtype, layout), ("dense", "gaps", "contiguous")[seed % 3])
for seed in range(24):
    conv, pool = (*cases.CONVS, None)[seed % 3], (*cases.STEP_POOLS, None)[seed % 4]
    cases.drawn_step(seed, conv, pool, special=seed % 5 == 0).check(driver, (16, 12 * 1024, 112 * 1024)[seed // 8])
print("clean")
