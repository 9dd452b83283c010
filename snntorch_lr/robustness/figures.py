"""Figures and HTML pages: colours of networks, panels, legends, a page that needs nothing else, broken images."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import cycle
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._messages import install
from .scoring import Share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "likelihood ratio": "#D55E00",
    "surrogate": "#0072B2",
    "surrogate same noise": "#56B4E9",
    "surrogate stopped": "#009E73",
    "surrogate noisy input": "#882255",
    "likelihood ratio noisy input": "#E69F00",
    "surrogate adversarial training": "#332288",
    "likelihood ratio adversarial training": "#CC79A7",
}
"""Colours of networks by name, warm for the likelihood ratio and cold for the surrogate.

Source: Okabe & Ito (2008), "Color Universal Design", which people with any colour vision tell apart.
"""
_LONG = {
    "surrogate noise": "surrogate same noise",
    "surrogate adversarial": "surrogate adversarial training",
    "lr": "likelihood ratio",
    "lr noisy input": "likelihood ratio noisy input",
    "lr adversarial": "likelihood ratio adversarial training",
}
_FURTHER = ("#7F7F7F", "#999933", "#44AA99", "#661100")


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Colours by name: the fixed ones of ``COLORS``, and for other names those that are left, in order.

    Hyphens and commas in a name do not matter, and ``lr`` is the likelihood ratio: checkpoints are called like their
    networks.

    Examples:
        >>> colors_of(["network", "surrogate"])
        {'surrogate': '#0072B2', 'network': '#D55E00'}
    """
    names = list(dict.fromkeys(names))
    words = {name: " ".join(re.findall(r"[^\W_]+", name.lower())) for name in names}
    plain = {name: _LONG.get(text, text) for name, text in words.items()}
    fixed = {name: COLORS[plain[name]] for name in names if plain[name] in COLORS}
    free = [color for color in (*COLORS.values(), *_FURTHER) if color not in fixed.values()]
    rest = [name for name in names if name not in fixed]
    return fixed | dict(zip(rest, cycle(free or _FURTHER), strict=False))


def percent(shares: Sequence[Share]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Accuracies in percent, and the lengths of their intervals below and above, for ``errorbar``."""
    middle = [100 * share.accuracy for share in shares]
    # Rounding may put an end of the interval on the wrong side of its middle.
    below = [100 * max(0.0, share.accuracy - share.low) for share in shares]
    above = [100 * max(0.0, share.high - share.accuracy) for share in shares]
    return middle, (below, above)


def new_figure(width: float = 7.0, height: float = 4.8, panels: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with panels in a row.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"matplotlib is missing: {install('experiments')}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, **shared)[0])


def with_legend(figure: Figure, axes: Axes, columns: int = 2, title: str | None = None) -> Figure:
    """The figure with the legend of one panel below all of them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    look = {"fontsize": "small", "title_fontsize": "small", "ncols": columns}
    figure.legend(handles, labels, loc="outside lower center", title=title, **look)
    return figure


def page(title: str, markdown: str, figures: Mapping[str, Figure | str]) -> str:
    """A self-contained page from Markdown: no style sheet, script, font or picture is loaded from elsewhere.

    Figures take the place of pictures, ``![words](name.png)``, by file name; a string is HTML. HTML in the Markdown is
    shown as text.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError(f"markdown-it-py is missing: {install('experiments')}") from error
    body = MarkdownIt("js-default", {"linkify": False}).render(markdown)
    # A wide table scrolls inside the page, and an accuracy stays on its line.
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    body = body.replace(" ± ", "&nbsp;±&nbsp;")

    def drawn(image: re.Match[str]) -> str:
        figure, caption = figures[image[1]], image[2]
        if isinstance(figure, str):
            return figure
        return f'<figure><div class="scroll">{_svg(figure)}</div><figcaption>{caption}</figcaption></figure>'

    body = re.sub(r'<p><img src="([^"]*)" alt="([^"]*)"[^>]*></p>', drawn, body)
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body=body)


def _svg(figure: Figure) -> str:
    """A figure as SVG, whose black is the colour of the text around it and whose white that of the page."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"]}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # Groups are numbered in each figure, and nothing refers to them.
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    for color, name in (("#ffffff", "var(--back)"), ("#000000", "currentColor"), ("black", "currentColor")):
        drawn = re.sub(rf'(fill|stroke)(: |="){color}\b', rf"\1\2{name}", drawn)
    return drawn.replace("<svg ", '<svg fill="currentColor" ', 1)


@dataclass(frozen=True)
class Example:
    """An image that an attack broke, to be looked at: its index among those attacked, pixels, classes, the attack.

    ``place`` is that among the images that this attack broke at this budget. ``spikes`` are of some neurons of the
    first layer, with noise if any has it, for the original and the adversarial image, ``[time, 2, neurons]``.
    """

    index: int
    original: Tensor
    adversarial: Tensor
    label: int
    predicted: int
    attack: str
    epsilon: float
    place: int
    layer: str = ""
    spikes: Tensor = field(default_factory=lambda: torch.zeros(0, 2, 0))


def examples(broken: Mapping[str, Sequence[Example]]) -> str:
    """Images that attacks broke beside their originals, by network, with the spikes of both; nothing if none."""
    parts = [
        f'<h3>{escape(network)}</h3>\n<div class="strip">{"".join(map(_card, images))}</div>\n'
        for network, images in broken.items()
        if images
    ]
    if not parts:
        return ""
    layers = ", ".join(dict.fromkeys(image.layer for images in broken.values() for image in images if image.layer))
    below = f" Below, spikes of {escape(layers)}: time from left to right, a line for each of the first neurons."
    return (
        "<h2>Images that attacks broke</h2>\n"
        "<p>Left the original, which the network has right; right what the attack made of it."
        f"{below if layers else ''}</p>\n{''.join(parts)}"
    )


def _card(example: Example) -> str:
    sides = []
    for image, caption, spikes in (
        (example.original, f"right: {example.label}", example.spikes[:, 0].T),
        (example.adversarial, f"taken for {example.predicted}", example.spikes[:, 1].T),
    ):
        raster = f'<img class="spikes" alt="spikes" src="{_png(_raster(spikes))}">' if spikes.numel() else ""
        count = f"<span>{int(spikes.sum())} spikes</span>" if spikes.numel() else ""
        picture = f'<img alt="{caption}" src="{_png(_pixels(image))}">'
        sides.append(f"<div>{picture}<span>{caption}</span>{raster}{count}</div>")
    about = escape(f"image {example.index}, {example.attack}, ε = {example.epsilon:g}")
    return f'<div class="broken"><p>{about}</p><div class="pair">{"".join(sides)}</div></div>'


def _pixels(image: Tensor) -> Tensor:
    """Pixels ``[height, width, 3]`` of an image ``[channels, height, width]``; of many channels their mean."""
    shown = image if len(image) in (1, 3) else image.mean(0, keepdim=True)
    return shown.clamp(0, 1).expand(3, *image.shape[1:]).permute(1, 2, 0)


def _raster(spikes: Tensor) -> Tensor:
    """Pixels ``[neurons, time, 4]``: blue where a neuron fires, and else transparent."""
    blue = torch.tensor([0.0, 0.45, 0.70, 1.0])
    return (spikes > 0).float()[..., None] * blue


def _png(pixels: Tensor) -> str:
    """A picture as a data URI."""
    try:
        from matplotlib.image import imsave
    except ImportError as error:
        raise ImportError(f"matplotlib is missing: {install('experiments')}") from error
    file = io.BytesIO()
    options: dict[str, Any] = {"format": "png", "metadata": {"Software": None}}
    imsave(file, pixels.contiguous().numpy(), **options)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
