"""How much data a small network for the even digits needs: arXiv 2505.15811, the MNIST figure, with the paper's ways and ours.

    python -m experiments.mnist.run            everything, about an hour on one core; finished points are not run again
    python -m experiments.mnist.run --draw     the figure and the table, from result.json

A network 784–1200–1200–10 knows all ten digits. Wanted: one with few hidden neurons that has the even ones right in 97 of 100
test images. Counted: images processed until it does, every pass over an image anew, scoring and refitting included, looked at
every 5 %. Rates, and how many images are scored on, are chosen on 5,000 training images that are put aside; the result is on
the test images, with other seeds.
"""

import copy
import math
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from experiments import results
from experiments.networks import (
    Elimination,
    Networks,
    accuracy,
    attribution,
    best,
    cross_entropy,
    cut,
    divergence,
    join,
    train,
)
from narrow_engine.regularize import GroupLasso

HERE = Path(__file__).resolve().parent
RESULTS, TEACHER = HERE / "result.json", HERE.parent / "out" / "teacher.safetensors"
NEURONS = (24, 30, 48, 96, 190, 400, 800)
"""Of both hidden layers together, as the paper's figure counts them; half are in each."""
SCORED = 480
"""Images that the paper scores on."""
BATCH, MOST, WANTED = 16, 60_000, 0.97
TEMPERATURE = 4.0
RATES: dict[str, tuple[float, ...]] = {
    "scratch": (1e-3, 3e-3, 6e-3),
    "distilled": (1e-3, 3e-3, 6e-3),
    "attribution": (4e-4, 1e-3, 3e-3, 6e-3),
    "lasso": (4e-4, 1e-3, 3e-3),
    "ours": (5e-4, 1e-3, 2e-3),
}
BEFORE: dict[str, tuple[int, ...]] = {"lasso": (1600, 3200, 6400), "ours": (120, 240, 480)}
"""Images before the training of the small network: under the group lasso, or for elimination and refit."""
PUBLISHED = {
    "attribution": {24: 50_000, 49: 19_000, 98: 13_800, 190: 7_800, 400: 5_000, 800: 2_300},
    "lasso": {24: 30_000, 46: 20_500, 120: 12_500, 470: 6_000},
    "distilled": {30: 42_000, 70: 17_000},
    "scratch": {30: 53_000},
}
"""Read off the paper's figure."""


class Images(NamedTuple):
    pixels: Tensor
    digits: Tensor

    def take(self, numbers: Tensor) -> "Images":
        return Images(self.pixels[numbers], self.digits[numbers])


class Data(NamedTuple):
    broad: Images
    """All ten digits; the rest are even."""
    training: Images
    validation: Images
    test: Images


@cache
def data(held: int = 5000) -> Data:
    """MNIST, pixels from 0 to 1, `held` of the training images put aside."""
    with np.load(HERE / "mnist.npz") as file:
        sides = [
            Images(torch.tensor(file[f"x_{side}"]).flatten(1).float() / 255, torch.tensor(file[f"y_{side}"]).long())
            for side in ("train", "test")
        ]
    order = torch.randperm(len(sides[0].digits), generator=torch.Generator().manual_seed(0))
    broad, validation = sides[0].take(order[held:]), sides[0].take(order[:held])
    return Data(broad, *(images.take((images.digits % 2 == 0).nonzero()[:, 0]) for images in (broad, validation, sides[1])))


def teach(images: Images, width: int = 1200, epochs: int = 12, seed: int = 0) -> Networks:
    """The paper's teacher: dropout of 0.2, Adam at 1e-3 with weight decay of 1e-4, batches of 128; the rate falls to zero."""
    network, batch = Networks(1, (784, width, width, 10), seed), 128
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
    torch.manual_seed(seed)
    steps = epochs * (len(images.digits) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        order = torch.randperm(len(images.digits))
        for numbers in order[: len(order) // batch * batch].view(-1, batch):
            pixels, digits = images.take(numbers)
            first = F.dropout(network.layer(0, pixels[None]).relu(), 0.2)
            second = F.dropout(network.layer(1, first).relu(), 0.2)
            optimizer.zero_grad()
            cross_entropy(network.layer(2, second), digits[None]).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network


def teacher() -> Networks:
    network = Networks(1, (784, 1200, 1200, 10), 0)
    if not TEACHER.exists():
        network = teach(data().broad)
        TEACHER.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in network.named_parameters()}, TEACHER)
    network.load_state_dict(load_file(TEACHER))
    return network


class Start(NamedTuple):
    """A small network before its training, and the images that it cost."""

    network: Networks
    images: int


def sample(images: Images, count: int, seed: int) -> Images:
    return images.take(torch.randperm(len(images.digits), generator=torch.Generator().manual_seed(seed))[:count])


def start(method: str, base: Networks, even: Images, neurons: int, before: int, seed: int) -> Start:
    """One network by a method, with half of `neurons` in each hidden layer."""
    size = neurons // 2
    if method in ("scratch", "distilled"):
        return Start(Networks(1, (784, size, size, 10), seed), 0)
    if method == "attribution":
        pixels, digits = sample(even, SCORED, seed)
        scores = attribution(base, pixels[None], digits[None])
        return Start(cut(base, [best(layer[0], size) for layer in scores]), SCORED)
    if method == "lasso":
        return lasso(base, even, size, before, seed)
    # One pass through the base, one through the cut network.
    found = elimination(base, even, before, seed)
    return Start(found.refitted(found.kept(size)), 2 * before)


@cache
def elimination(base: Networks, even: Images, count: int, seed: int) -> Elimination:
    return Elimination(base, sample(even, count, seed).pixels)


def lasso(base: Networks, even: Images, size: int, images: int, seed: int) -> Start:
    """Group lasso by proximal steps on the whole base, from the paper's scores, until all but `size` neurons a layer are zero."""
    pixels, digits = sample(even, SCORED, seed)
    scores = torch.cat([layer[0][None] for layer in attribution(base, pixels[None], digits[None])]).double()
    network, steps = copy.deepcopy(base), images // BATCH
    groups = GroupLasso(network.groups(), scores, 1 - size / scores.shape[1], steps)
    seen = sample(even, images, seed + 1000)

    def loss(step: int) -> Tensor:
        batch = slice(step * BATCH, (step + 1) * BATCH)
        return cross_entropy(network(seen.pixels[None, batch]), seen.digits[None, batch])

    train(network, 1e-3, steps, loss, after_step=groups, clip=1.0)
    return Start(cut(network, [best(norms, size) for norms in groups.norms()]), SCORED + images)


def datapoints(
    method: str, starts: list[Start], base: Networks, even: Images, judged: Images, rate: float, seed: int
) -> list[float]:
    """Images processed until each network has 97 of 100 of `judged` right; infinite after MOST."""
    networks, spent = join([s.network for s in starts]), starts[0].images
    draws = [torch.Generator().manual_seed(seed + n) for n in range(networks.count)]
    epochs = MOST // len(even.digits) + 1
    order = torch.stack([torch.cat([torch.randperm(len(even.digits), generator=draw) for _ in range(epochs)]) for draw in draws])
    reached, following = torch.full((networks.count,), math.inf), 0

    def stop(step: int) -> bool:
        nonlocal following
        done = spent + step * BATCH
        if done >= following:
            following = max(done + 64, int(done * 1.05))
            with torch.no_grad():
                right = accuracy(networks(judged.pixels[None]), judged.digits[None]) >= WANTED
            reached[right & reached.isinf()] = done
        return not bool(reached.isinf().any())

    def loss(step: int) -> Tensor:
        numbers = order[:, step * BATCH : (step + 1) * BATCH]
        logits = networks(even.pixels[numbers])
        if method not in ("distilled", "ours"):
            return cross_entropy(logits, even.digits[numbers])
        with torch.no_grad():
            told = base(even.pixels[numbers].flatten(0, 1)[None]).view(logits.shape)
        return divergence(logits, told, TEMPERATURE)

    train(networks, rate, (MOST - spent) // BATCH, loss, stop=stop, clip=1.0)
    return reached.tolist()


def tuned(method: str, base: Networks, neurons: int, found: Data, seeds: range) -> tuple[int, float]:
    """Images before training, and rate: the pair with the fewest datapoints on the validation images."""
    tried = {}
    for before in BEFORE.get(method, (0,)):
        starts = [start(method, base, found.training, neurons, before, seed) for seed in seeds]
        for rate in RATES[method]:
            reached = datapoints(method, starts, base, found.training, found.validation, rate, seeds[0])
            tried[before, rate] = fmean(min(count, 2 * MOST) for count in reached)
    return min(tried, key=lambda pair: tried[pair])


def measure(method: str, neurons: int, base: Networks, found: Data, tuning: range, seeds: range) -> dict[str, Any]:
    """One point of the frontier."""
    before, rate = tuned(method, base, neurons, found, tuning)
    starts = [start(method, base, found.training, neurons, before, seed) for seed in seeds]
    reached = datapoints(method, starts, base, found.training, found.test, rate, seeds[0])
    counts = [None if math.isinf(count) else int(count) for count in reached]
    return {"method": method, "neurons": neurons, "before": before, "rate": rate, "datapoints": counts}


def mean(row: dict[str, Any]) -> float:
    """Of a point's seeds; infinite where fewer than half arrive, as in the paper's code, which counts the others at the limit."""
    counts = [MOST if count is None else count for count in row["datapoints"]]
    return fmean(counts) if sum(count is None for count in row["datapoints"]) * 2 <= len(counts) else math.inf


def best_published(neurons: int) -> float:
    """The fewest datapoints of any of the paper's ways at this size, between its points by straight lines in logarithms."""
    found = []
    for points in PUBLISHED.values():
        sizes = sorted(points)
        if len(sizes) > 1 and sizes[0] <= neurons <= sizes[-1]:
            logs = [math.log(points[size]) for size in sizes]
            found.append(math.exp(float(np.interp(math.log(neurons), [math.log(size) for size in sizes], logs))))
    return min(found)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| hidden neurons | " + " | ".join(RATES) + " | the paper's best | ours ÷ that |", "|---" * (len(RATES) + 3) + "|"]
    for neurons in NEURONS:
        means = {row["method"]: mean(row) for row in rows if row["neurons"] == neurons}
        cells = ["–" if math.isinf(value) else f"{value:,.0f}" for value in (means.get(m, math.inf) for m in RATES)]
        paper = best_published(neurons)
        lines.append(f"| {neurons} | {' | '.join(cells)} | {paper:,.0f} | {means['ours'] / paper:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.ticker import FuncFormatter

    plt = results.pyplot()
    hollow: dict[str, Any] = {"linestyle": "--", "marker": "o", "markerfacecolor": "white", "markersize": 4}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, method in enumerate(RATES):
        points = [(row["neurons"], mean(row)) for row in rows if row["method"] == method and not math.isinf(mean(row))]
        axes.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=4, label=method)
        if method in PUBLISHED:
            axes.plot(*zip(*PUBLISHED[method].items(), strict=True), color=f"C{number}", **hollow)
    axes.plot([], [], color="grey", label="as published", **hollow)
    axes.set(xscale="log", yscale="log", xlabel="hidden neurons (the base: 2,400)")
    axes.set_ylabel("images processed to 97 % of even digits")
    axes.set_xticks(NEURONS, [str(n) for n in NEURONS])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    only_draw = results.begin(__doc__)
    rows = results.read(RESULTS)
    if not only_draw:
        base, found = teacher(), data()
        with torch.no_grad():
            right = accuracy(base(found.test.pixels[None]), found.test.digits[None]).item()
        print(f"the base has {right:.4f} of the even test images right")
        for neurons in NEURONS:
            for method in reversed(RATES):
                if any((row["method"], row["neurons"]) == (method, neurons) for row in rows):
                    continue
                few = method == "lasso"
                rows.append(measure(method, neurons, base, found, range(100, 102 if few else 103), range(3 if few else 10)))
                results.write(RESULTS, rows)
                print(rows[-1], flush=True)
    draw(rows, HERE / "figure.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
