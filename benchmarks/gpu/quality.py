"""Stage 3: accuracy of every kind of policy on a model trained here for a few minutes. Under 10 minutes on a GPU.

    python3 -m benchmarks.gpu.quality [--tiny] [--minutes 5.5] [--items 2000] [--size gpu|tiny] [--out FILE]

At least 60 million parameters and 64 experts, trained from nothing on the tasks of tests/assets/make, bf16 products; then every
policy decodes the same items in full batches of 1, 4, 16 and 64 sequences in float32, as `benchmarks/policies.py` does on the small
model: drops are paired with exact routing at the same batch size, with two-sided 95 % score limits. Figures are kept, weights are
not. Needs torch, numpy, scipy, transformers and tokenizers. `--tiny` runs all of it on a CPU in seconds, with a model that
has learnt next to nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import RESULTS, Check, Report, at_least

SIZES: dict[str, dict[str, int]] = {
    "gpu": {"hidden": 256, "layers": 4, "experts": 64, "top_k": 8, "inner": 320},
    "tiny": {"hidden": 64, "layers": 2, "experts": 16, "top_k": 4, "inner": 32},
}
BATCHES = (1, 4, 16, 64)
LEAST_PARAMETERS, LEAST_EXPERTS = 60e6, 64
CALIBRATION, SEED = 400, 2


def grid(top_k: int, most: int) -> list[dict[str, Any]]:
    """Every policy, exact first; budgets from `most` experts on limit nothing."""
    slots = [S for S in (1, 2, 4) if S < top_k]
    found: list[dict[str, Any]] = [{"kind": "exact"}]
    found += [{"kind": "sere", "S": S, "rho": rho} for S in slots for rho in (0.0, 0.3, 0.5)]
    found += [{"kind": kind, "S": S} for kind in ("topk", "oea") for S in slots]
    found += [{"kind": "budget", "maxExperts": N} for N in (4, 8, 12, 16, 24, 32)]
    found += [{"kind": "hybrid", "S": S, "rho": rho} for S in slots[:2] for rho in (0.3, 0.5)]
    return [bucket for bucket in found if bucket.get("maxExperts", 0) < most]


HEAD = ["batch", "policy", "active", "of", "correct %", "points lost", "95 %", "front"]


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table's rows, by batch and active experts."""
    return [
        [
            str(row["batch"]), row["policy"], f"{row['active']:.1f}", f"{row['activeBefore']:.1f}", f"{row['correctPercent']:.2f}",
            f"{row['dropPoints']:.2f}", f"{row['dropLow']:.2f} to {row['dropHigh']:.2f}", "yes" if row["front"] else "",
        ]
        for row in sorted(rows, key=lambda row: (row["batch"], row["active"]))
    ]  # fmt: skip


def checks(parameters: int, experts: int, rows: list[dict[str, Any]]) -> list[Check]:
    exact = [row["correctPercent"] for row in rows if row["kind"] == "exact"]
    return [
        at_least("parameters >= 60 million", parameters / 1e6, LEAST_PARAMETERS / 1e6, " million"),
        at_least("experts >= 64", experts, LEAST_EXPERTS),
        at_least("exact routing answers at least 80 %, so that there is accuracy to lose", min(exact, default=None), 80, " %"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--minutes", type=float, default=5.5, help="of training")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--until", type=float, default=9.3, help="minutes after which no policy is begun")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model, seconds of training, few items: its figures say nothing"
    )
    args = parser.parse_args()
    if args.tiny:
        args.size, args.minutes, args.items, args.batch, args.until = "tiny", 0.02, 4, [2], 3.0
    report = Report("quality", args.out)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    from benchmarks import policies
    from benchmarks.gpu import moe
    from benchmarks.lanes import prompted
    from tests.assets.make.short_tasks import SHORT

    model = moe.Moe(moe.config(**SIZES[args.size]), device)
    report.say(f"{model.parameters() / 1e6:.1f} million parameters, {model.experts} experts, on {device}")
    trained = model.train_for(60 * args.minutes, report.say)
    report.say(f"trained: {trained}")
    report.keep(
        parameters=model.parameters(), experts=model.experts, topK=model.top_k, items=args.items, seed=SEED, training=trained
    )
    torch.set_default_device(device)  # what lanes.py makes anew stands beside the weights
    with torch.no_grad():
        similarity = model.similarity(
            [item.prompt + item.answer for item in SHORT.items("calibration", 8 if args.tiny else CALIBRATION, 0)]
        )
        asked = prompted(model, SHORT.items("eval", args.items, SEED))
        rows: list[dict[str, Any]] = []
        # The larger batches first: they are what is served.
        for batch in sorted(args.batch, reverse=True):
            left = 60 * args.until - report.seconds()
            kinds = grid(model.top_k, batch * model.top_k)
            cells = policies.measure(model, asked, similarity, batch, kinds[:3] if args.tiny else kinds, left)
            policies.mark_front(cells)
            rows += [cell.row for cell in cells]
            report.keep(rows=rows)
    report.finish(HEAD, lines(rows), checks(model.parameters(), model.experts, rows))


if __name__ == "__main__":
    main()
