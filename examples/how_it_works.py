"""Draw the README's picture: a key of the shipped model on its way into the cache and back.

    python -m examples.how_it_works

Nothing in it is a sketch: the key is one that `books-7m` computes from a text in this repository,
centred, equalised, rotated, coded (to the nearest level: there are no queries in the picture) and
read back by the quantiser that the cache uses. It needs matplotlib (the extra `eval`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rotorquant_hf import RotorQuantCache, RotorQuantConfig, RotorQuantMSE
from rotorquant_hf.passing import cache_argument

HERE = Path(__file__).parent
LAYER, HEAD, TOKEN = 5, 0, 500
BITS, TOKENS = 3, 1000
INK, FAINT, BLUE, ORANGE = "#1f2328", "#8c959f", "#0969da", "#d1570a"


def main(argv: list[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="Draw the README's picture.")
    parser.add_argument("--output", type=Path, default=HERE / "how_it_works.svg")
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("svg")
    # The same bytes from the same figures, and text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "rotorquant", "svg.fonttype": "none"})
    matplotlib.rcParams.update({"font.family": "sans-serif", "font.size": 10, "text.color": INK})
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(9.6, 5.6))
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.7), hspace=0.62, wspace=0.2)
    keys = _keys()
    _draw_layout(figure.add_subplot(grid[0, :]), keys.shape)
    _draw_key(figure, [figure.add_subplot(grid[1, i]) for i in range(3)], keys)
    figure.savefig(
        args.output,
        bbox_inches="tight",
        metadata={"Date": None},
        facecolor="white",
        pad_inches=0.15,
    )
    print(args.output)


def _keys() -> Tensor:
    """Keys of one layer, (heads, tokens, d) float32, after RoPE."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "books-7m", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "books-7m")
    text = (HERE / "sampled" / "road.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
    return cache.layers[LAYER].keys[0]


def _draw_layout(axes, shape: torch.Size) -> None:
    """Tokens along, bits per element up: areas are bytes."""
    config = RotorQuantConfig(key_bits=BITS, value_bits=BITS)
    cache = RotorQuantCache(config)
    states = torch.randn(1, shape[0], TOKENS, shape[2], dtype=torch.bfloat16)
    cache.update(states, states, 0)
    memory = cache.memory()
    sinks = config.num_sink_tokens
    packed = round(memory.packed_numbers / memory.numbers * TOKENS)
    bits = 8 * memory.packed_bytes / memory.packed_numbers
    parts = (
        (0, sinks, 16.0, ORANGE, f"first {sinks}"),
        (sinks, packed, bits, BLUE, f"{packed} tokens quantised once: {bits:.2f} bits per element"),
        (sinks + packed, TOKENS - sinks - packed, 16.0, ORANGE, "recent\nwindow"),
    )
    axes.bar(TOKENS / 2, 16, TOKENS, color="none", edgecolor=FAINT, linestyle="--", linewidth=0.8)
    for start, width, height, color, text in parts:
        axes.bar(start + width / 2, height, width, color=color, linewidth=0)
        inside = width > 100
        axes.text(
            start + width / 2 if inside else start + width + 4,
            height / 2 if inside else 13,
            text,
            color="white" if inside else ORANGE,
            ha="center" if inside else "left",
            va="center",
        )
    axes.text(TOKENS / 2, 10, "what an uncompressed cache takes", color=FAINT, ha="center")
    axes.set_title(f"The cache of a prompt of {TOKENS:,} tokens (areas are bytes)", loc="left")
    axes.set(xlim=(-4, TOKENS + 4), ylim=(0, 16.5), ylabel="bits", yticks=(0, 8, 16))
    axes.set_xlabel("tokens, oldest first")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_key(figure, panels, keys: Tensor) -> None:
    """One key: as it is; centred, equalised and rotated; read back."""
    d = keys.shape[-1]
    quantizer = RotorQuantMSE(d, BITS, scale="least_squares")
    # D = rms^1/2 per channel, shared by the two channels of a RoPE pair.
    rms = keys[HEAD].square().mean(dim=0).unflatten(0, (2, d // 2)).mean(dim=0).sqrt().repeat(2)
    mean = keys[HEAD].mean(dim=0)
    key = keys[HEAD, TOKEN]
    u = (key - mean) / rms.sqrt()
    rotated = quantizer.rotation.rotate(u) / u.norm()
    levels = quantizer.centroids
    index = torch.bucketize(rotated, quantizer.boundaries)
    back = quantizer(u)[0] * rms.sqrt() + mean
    channels = range(d)

    panels[0].bar(channels, key, color=FAINT, width=1)
    panels[0].set_title("1  a key", loc="left")
    for level in levels.tolist():
        panels[1].axhline(level, color=BLUE, linewidth=0.6, alpha=0.6)
    panels[1].scatter(channels, rotated, s=9, color=INK, zorder=3)
    panels[1].vlines(channels, rotated, levels[index], color=ORANGE, linewidth=0.8, zorder=2)
    panels[1].set_title("2  equalised, rotated, coded", loc="left")
    panels[2].bar(channels, key, color=FAINT, width=1)
    panels[2].scatter(channels, back, s=9, color=BLUE, zorder=3)
    panels[2].set_title("3  read back", loc="left")
    reach = 1.08 * max(float(key.abs().max()), float(back.abs().max()))
    for panel in (panels[0], panels[2]):
        panel.set_ylim(-reach, reach)
    panels[1].set_ylim(-1.1 * float(rotated.abs().max()), 1.1 * float(rotated.abs().max()))
    for panel in panels:
        panel.set_xlim(-1, d)
        panel.set(xticks=(), yticks=())
        panel.spines[["top", "right", "bottom", "left"]].set_color("#d0d7de")
    panels[0].set_xlabel(f"{d} channels, {2 * d} bytes")
    panels[1].set_xlabel(f"coordinates; the {len(levels)} levels")
    panels[2].set_xlabel(f"from {d * BITS // 8} + 2 bytes (blue)")


if __name__ == "__main__":
    main()
