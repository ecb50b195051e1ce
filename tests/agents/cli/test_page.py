"""The page of a run: one file that shows its figures, numbers and settings."""

import base64
import re
from html.parser import HTMLParser

import pytest

from agents.cli.config import Config
from agents.cli.page import write_page
from tests.agents.cli.support import read_summary


class _Page(HTMLParser):
    """The texts, the images and the addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.images, self.addresses = [], [], []
        self.feed(text)

    def handle_data(self, data):
        self.texts.append(" ".join(data.split()))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes["src"])
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_it_has_figures_numbers_and_settings(finished):
    page = _Page((finished / "index.html").read_text(encoding="utf-8"))
    shown = [base64.b64decode(source.partition(",")[2]) for source in page.images]
    names = ("before_after.png", "learning_curve.png", "held_out.png")
    assert shown == [(finished / name).read_bytes() for name in names]
    assert all(address.startswith("data:") for address in page.addresses)  # nothing of another host
    assert "“three green squares”" in page.texts
    summary = read_summary(finished)
    assert f"{summary['reward_after']:.3f}" in page.texts
    for name, value in (("num_inference_steps", "2"), ("lora_rank", "2"), ("kl_coef", "0.001"), ("seed", "1")):
        assert (
            page.texts[page.texts.index(name) + 1 :][:2].count(value)
            or value in page.texts[page.texts.index(name) :][:4]
        )


def test_a_run_that_has_not_ended(finished, tmp_path):
    summary = read_summary(finished) | {"interrupted": True, "prompts": "<b>$5</b>", "warnings": ["the KL is large"]}
    text = write_page(tmp_path, summary, Config.read(finished)).read_text(encoding="utf-8")
    assert "&lt;b&gt;$5&lt;/b&gt;" in text  # a prompt is no part of the page
    assert "Warning: the KL is large" in text
    assert "dpok train --resume" in text
    assert not re.search("<img|Numbers", text)


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_a_screen(finished, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto((finished / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    page.close()
