"""`python docs/idea.py`: draw docs/idea.png, the picture of the method in the README."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

AGENTS = (("planner", "#54aeff"), ("critic", "#4ac26b"), ("refiner", "#d4a72c"), ("solver", "#c297ff"))
PROMPT, LATENT, ANSWER, SIZE, GAP = 4, 3, 4, 0.8, 0.9


def main() -> None:
    figure, axes = plt.subplots(figsize=(11, 2.4), layout="constrained")
    x = 0.0
    spans = []
    for name, color in AGENTS:
        last = name == AGENTS[-1][0]
        begin = x
        for i in range(PROMPT + (ANSWER if last else LATENT)):
            latent, answer = not last and i >= PROMPT, last and i >= PROMPT
            face = "white" if answer else color
            axes.add_patch(
                Rectangle((x, 0), SIZE * 0.9, 1, facecolor=face, alpha=1.0 if latent else 0.45, edgecolor=color, lw=1.5)
            )
            if latent:
                axes.text(x + SIZE * 0.45, 0.5, f"h{i - PROMPT}", ha="center", va="center", fontsize=8, color="white")
            x += SIZE
        middle = begin + PROMPT * SIZE / 2
        axes.text(middle, -0.25, f"{name} reads", ha="center", va="top", fontsize=9)
        axes.text(
            begin + (PROMPT + (ANSWER if last else LATENT) / 2) * SIZE, -0.25,
            "answers" if last else "thinks", ha="center", va="top", fontsize=9,
        )  # fmt: skip
        spans.append((begin, x))
        x += GAP
    end = spans[-1][1] - ANSWER * SIZE / 2
    for (begin, stop), (_, color) in zip(spans[:-1], AGENTS, strict=False):
        source = (begin + stop) / 2
        axes.add_patch(
            FancyArrowPatch((end, 1.05), (source, 1.05), connectionstyle="arc3,rad=0.16", arrowstyle="-|>",
                            mutation_scale=12, color=color, lw=1.8)
        )  # fmt: skip
    axes.text(end, 1.25, "loss", ha="left", va="bottom", fontsize=10, weight="bold")
    axes.text(spans[0][0], -1.15, "one trace: keys and values of all tokens, written once, in place", fontsize=9.5)
    axes.text(spans[-1][1], -1.15, "arrows: gradients through cached keys and values", ha="right", fontsize=9.5)
    axes.set(xlim=(-0.3, spans[-1][1] + 0.6), ylim=(-1.4, 2.9))
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("idea.png"), dpi=140)


if __name__ == "__main__":
    main()
