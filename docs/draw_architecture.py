"""Draws docs/architecture.png: `make figures`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from calm_transformers.command_line import Parser, command

BACKBONE, HEAD, AUTOENCODER, TEXT = "#3b6ea5", "#b5542b", "#4b8b5a", "#f4f1ea"
PATCHES = ["Once·upon·a·time", ",·there·was·a", "·little·girl·named"]


def box(axes, x, y, width, height, text, color, size=10, text_color="white"):
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="none", zorder=2))
    middle = x + width / 2, y + height / 2
    axes.text(*middle, text, ha="center", va="center", color=text_color, fontsize=size, zorder=3)


def arrow(axes, start, end, style="-", color="#444444"):
    arrow_style = {"arrowstyle": "-|>", "lw": 1.4, "ls": style, "color": color}
    axes.annotate("", end, start, arrowprops=arrow_style, zorder=1)


def draw() -> Figure:
    figure, axes = plt.subplots(figsize=(11, 6.2))
    for column, patch in enumerate(PATCHES):
        x = 0.4 + 3.4 * column
        box(axes, x, 0.2, 2.8, 0.6, patch, TEXT, 11, "#222222")
        box(axes, x, 1.2, 2.8, 0.6, "K embeddings → 1 input", BACKBONE)
        box(axes, x, 3.3, 2.8, 0.6, "generative head + noise", HEAD)
        box(axes, x, 4.35, 2.8, 0.6, "decoder (frozen)", AUTOENCODER)
        next_patch = PATCHES[column + 1] if column + 1 < len(PATCHES) else "·Lily.·She·loved"
        box(axes, x, 5.4, 2.8, 0.6, next_patch, TEXT, 11, "#222222")
        middle = x + 1.4
        for low, high in [(0.8, 1.2), (1.8, 2.2), (2.85, 3.3), (3.9, 4.35), (4.95, 5.4)]:
            arrow(axes, (middle, low), (middle, high))
        axes.text(middle + 0.08, 4.12, "latent vector z", fontsize=8.5, va="center", color="#444444")
        if column + 1 < len(PATCHES):
            arrow(axes, (x + 2.84, 5.7), (x + 3.75, 0.84), "--", "#999999")
    box(axes, 0.4, 2.2, 9.6, 0.65, "Llama backbone over patches: one position per K = 4 tokens", BACKBONE, 11)
    axes.text(10.25, 5.7, "next K tokens", va="center", fontsize=10)
    axes.text(10.25, 0.5, "K tokens", va="center", fontsize=10)
    axes.text(10.25, 3.6, "draw N, keep\nwhat repeats:\nP(patch)$^{1/T}$", va="center", fontsize=10)
    axes.set(xlim=(0.2, 11.7), ylim=(0, 6.2))
    axes.axis("off")
    return figure


@command
def main(argv: list[str] | None = None) -> None:
    Parser("python docs/draw_architecture.py", __doc__).parse_args(argv)
    draw().savefig(Path(__file__).with_name("architecture.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
