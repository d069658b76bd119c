"""The HTML report: it stands alone, escapes all it is told, says what the summary says, and draws what it got."""

from __future__ import annotations

import base64
import builtins
import copy
import html
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapter.config.load import from_dict
from adapter.verify import plot, report
from policies.errors import UserError

VOID = {"meta", "img", "link", "br", "hr", "input"}
DEMO = Path(__file__).parents[2] / "launch" / "demo"
ATTACK = "<script>alert(1)</script>"
MARKED = 'a"b\'c<i>&amp;'  # an id
VISION, TEXT = ["visual.blocks.0", "visual.blocks.1"], ["model.layers.0", "model.layers.1"]


class Page(HTMLParser):
    """Tags with their attributes, the text inside each kind of element; fails where tags do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.open, self.text, self.declaration = [], [], {}, None
        self.feed(page)
        self.close()
        assert not self.open

    def handle_decl(self, decl):
        self.declaration = decl

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        for tag in {*self.open}:
            self.text[tag] = self.text.get(tag, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def layers(names, error=1e-6, share=0.1):
    return [{"name": n, "error": error * (at + 1), "share_of_bound": share} for at, n in enumerate(names)]


def a_row(name, **how):
    row = {"id": name, "requests": [name], "prompt_tokens": 51, "new_tokens": 8,
           "answer": "red", "one_process_answer": "red", "max_abs_logit_diff": 1.2e-5,
           "mean_abs_logit_diff": 3e-7, "largest_logit": 14.2,
           "greedy_match": {"equal": 8, "of": 8}, "parted": [], "first_divergent_module": None, "modules_checked": 512,
           "largest_share_of_bound": 0.21, "largest_at": "model.layers.1.mlp.down_proj", "ranks_agree": True,
           "decode_error_ratio": 1.1, "layers": layers(VISION + TEXT), "passed": True, "problems": []}
    return row | how


def diverged(name, module, **how):
    found = {"module": module, "what": "output", "error": 0.31, "bound": 1.1e-5, "ranks": [2]}
    parted = [{"position": 3, "ours": 17, "one_process": 44, "top2_gap": 0.002}]
    return a_row(name, first_divergent_module=found, parted=parted, passed=False, problems=["tokens part"]) | how


SUMMARY = {
    "summary": True, "model": "/models/a<b", "tp_size": 4, "dtype": "float32", "cases": 2, "passed": True,
    "problems": [], "reassembly": {"tensors": 91, "bytes": 1738000, "equal": True, "differing": []},
    "bound": "error < 2 k u sum |w x|",
    "seconds": 12.3, "versions": {"torch": "2.14.1"}, "all_reduce": "gloo",
    "ranks": [{"rank": 1, "q_heads": [7, 14], "kv_heads": [1, 2], "vision_heads": [4, 4], "weight_bytes": 1234567}],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    home = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0).integers(0, 256, (600, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(home / "tall.png")
    (home / "broken.png").write_bytes(b"no picture")
    requests = [
        {"id": "1", "prompt": ATTACK, "images": ["tall.png", "broken.png", "missing.png"]},
        {"id": MARKED, "prompt": "plain & simple", "videos": [str(DEMO / "pictures" / "11-motion.mp4")]},
        {"id": "3", "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "video", "video": ["tall.png"] * 7},
                                         {"type": "text", "text": "<b>?"}]},
        ]},
        {"id": "4", "prompt": "half \ud800 a pair, a bell \x07", "expected": "<u>blue</u>"},
    ]
    mapping = {"model": {"path": str(DEMO / "checkpoint")}, "requests": requests}
    return from_dict(mapping, home)


@pytest.fixture
def rows():
    return some_rows()


@pytest.fixture(scope="module")
def page(config):
    return report.render(config, some_rows(), SUMMARY)


def some_rows():
    return [
        a_row("1", answer=f'"{ATTACK}\'', one_process_answer=f'"{ATTACK}\''),
        a_row(MARKED, first_divergent_module=None, layers=layers(TEXT)),
        a_row("all of it", requests=["1", MARKED, "3"], answer=["<one>", "two", "three"],
              one_process_answer=["<one>", "two", "4 & more"], layers=[]),
        {"id": "4", "error": f"it says {ATTACK}"},
        diverged("no such request", "visual.blocks.1.attn.proj", extra_figure=7.25, extra_list=[1]),
    ]


def svg_of(page):
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", page, re.DOTALL)[0])


def test_the_page_is_well_formed_and_runs_and_loads_nothing(page):
    parsed = Page(page)
    assert parsed.declaration == "DOCTYPE html"
    assert [a["type"] for a in parsed.all("script")] == ["application/json"]
    assert not any(parsed.all(tag) for tag in ("link", "iframe", "object", "base", "form"))
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
            assert re.match(r"data:image/jpeg;base64,|#", attributes.get(name, "#")), (tag, attributes)
    assert {"url(#"} >= set(re.findall(r"url\(.", page)) and "@import" not in page
    assert set(re.findall(r"https?://[^\"]*", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    anchors = [attributes["id"] for tag, attributes in parsed.tags if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    assert {a["href"][1:] for a in parsed.all("a")} == {f"case-{n}" for n in range(1, 6)} <= set(anchors)


def test_everything_said_is_there_and_escaped(page):
    assert "<script>alert" not in page and "<one>" not in page and "<u>blue" not in page and "<i>" not in page
    body, said = page.split("<script")[0], Page(page).text["body"]
    for text in (ATTACK, f'"{ATTACK}\'', MARKED, "<one>", "4 & more", f"it says {ATTACK}", "plain & simple", "<b>?",
                 "be brief", SUMMARY["model"], SUMMARY["bound"], "no such request"):
        assert str(jinja_escaped(text)) in body and text in said
    for text in ("visual.blocks.1.attn.proj (output): error 0.31, bound 1.1e-05, of rank 2", "extra figure 7.25",
                 "8 of 8", "torch: 2.14.1", "1,738,000 bytes", "tokens part"):
        assert text in " ".join(said.split())
    article = body[body.index('id="case-5"'):]
    parted = ["position", "ours", "one process", "top2 gap", "3", "17", "44", "0.002"]
    assert re.findall(r"<t[hd]>(.*?)</t", article) == parted
    page.encode("utf-8")
    assert "half ? a pair, a bell \ufffd" in page  # neither may stand in an HTML file


def jinja_escaped(text):
    return html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")


def test_answers_that_differ_are_marked(page):
    article = re.search(r'id="case-3".*?</article>', page, re.DOTALL)[0]
    assert re.findall(r'class="answers( differ)?"', article) == ["", "", " differ"]


def test_the_rows_are_embedded_as_they_are(config, rows):
    rows[0]["answer"] = rows[0]["one_process_answer"] = "</script><!-- \u2028 \ud800"
    rows[0]["max_abs_logit_diff"], rows[1]["max_abs_logit_diff"] = math.nan, math.inf
    before = copy.deepcopy(rows)
    page = report.render(config, rows, SUMMARY)
    assert str(rows) == str(before)
    held = json.loads(Page(page).text["script"], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows[0]["max_abs_logit_diff"], rows[1]["max_abs_logit_diff"] = "nan", "inf"
    assert held == {"summary": SUMMARY, "rows": rows}


def test_the_verdict_follows_the_summary(config):
    rows = [a_row("a", layers=[]), a_row("b", layers=[], passed=False, problems=["ranks disagree"])]
    held = Page(report.render(config, rows, SUMMARY)).text
    assert held["h1"] == "Held" and held["title"].startswith("Held") and "First at" not in held["header"]
    for summary in (SUMMARY | {"passed": False}, {k: v for k, v in SUMMARY.items() if k != "passed"}):
        not_held = Page(report.render(config, rows, summary)).text
        assert not_held["h1"] == "Did not hold" and not_held["title"].startswith("Did not hold")
        assert "First at case b: ranks disagree" in not_held["header"]


DIFFERING = {"equal": False, "differing": [{"tensor": "model.norm.weight", "rank": 2, "why": "a bit <flipped>"}]}


@pytest.mark.parametrize(("rows", "more", "where"), [
    ([diverged("a", "model.layers.1.mlp"), diverged("b", "visual.blocks.1.attn")], {}, "case b, visual.blocks.1.attn"),
    ([diverged("a", "visual.blocks.0.mlp"), diverged("b", "visual.patch_embed.proj")], {}, "case b, visual.patch_"),
    ([diverged("a", "lm_head"), diverged("b", "model.layers.1.mlp")], {}, "case b, model.layers.1.mlp ("),
    ([diverged("a", "model.layers.0.mlp", layers=[])], {}, "case a, model.layers.0.mlp ("),
    ([diverged("a", "lm_head")], {"reassembly": DIFFERING}, "the weights: model.norm.weight of rank 2: a bit"),
    ([a_row("a")], {"reassembly": {"equal": False}}, "the weights: put together again"),
    ([a_row("a"), {"id": "b", "error": "no such file"}], {}, "case b: no such file"),
    ([a_row("a"), a_row("b", passed=False, problems=["ranks disagree"])], {}, "case b: ranks disagree"),
    ([a_row("a")], {"problems": ["a rank was lost"]}, "a rank was lost"),
])
def test_where_it_first_went_wrong(rows, more, where):
    assert report._where_first(rows, SUMMARY | more, plot.Layers.of(rows, "visual")).startswith(where)


def test_the_vision_encoder_is_what_the_family_calls_it():
    found = plot.Layers.of([a_row("1", layers=layers(["model.eyes.blocks.0", "model.layers.0"]))], "model.eyes")
    assert [found.stack(name) for name in found.names] == ["vision encoder", "language model"]
    assert found.position("model.eyes.patch_embed") == -0.3 and found.position("lm_head") == 1.3


def test_pictures_are_small_and_unreadable_ones_are_words(page):
    sizes = []
    for attributes in Page(page).all("img"):
        data = base64.b64decode(attributes["src"].split(",")[1], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            sizes.append(image.size)
        assert len(data) < 40_000
    film = sizes[1:5]
    assert all(max(size) <= report.FRAME_SIDE for size in film)
    assert sizes == [(128, 256), *film, (128, 256), *film, *[(64, 128)] * 4]  # each alone, then the batch of all three
    assert page.count("broken.png: not an image of a known format") == 2
    assert page.count("missing.png: no such file") == 2


def test_frames_of_a_film_differ(config, rows):
    frames = [attributes["src"] for attributes in Page(report.render(config, [rows[1]], SUMMARY)).all("img")]
    assert len(set(frames)) == len(frames) == report.FRAMES


def test_the_plot_shows_every_case(config, rows, page):
    svg = svg_of(page)
    words = ["".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"vision encoder", "language model", "a case", "a case that did not hold", "median of 3 cases", "limit",
            "largest of 3 cases", "first divergent", "first divergent module: visual.blocks.1.attn.proj"} <= set(words)
    assert "currentColor" in page and plot.INK not in page
    again = report.render(config, [*rows, a_row("another")], SUMMARY)
    assert "median of 4 cases" in again and len(again) > len(page)


def test_the_same_rows_are_the_same_page(config, rows, page):
    assert report.render(config, rows, SUMMARY) == page


def test_the_figure_holds_the_numbers():
    rows = [a_row("1", layers=layers(TEXT, 1e-6)), a_row("2", layers=layers(VISION + TEXT, 1e-5, 0.4)),
            diverged("3", "model.layers.0.mlp", layers=layers(VISION + TEXT, 1e-4, 7.0))]
    found = plot.Layers.of(rows, "visual")
    assert list(found.names) == VISION + TEXT
    errors, shares = plot.figure_of(rows, found).axes
    assert errors.get_yscale() == shares.get_yscale() == "log"
    lines = {line.get_label(): list(line.get_ydata()) for line in errors.get_lines()}
    assert lines["a case that did not hold"] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])
    assert lines["median of 3 cases"] == pytest.approx([5.5e-5, 1.1e-4, 3e-5, 4e-5])
    first = next(line for line in errors.get_lines() if len(line.get_ydata()) == 4)
    assert np.isnan(first.get_ydata()[:2]).all() and first.get_ydata()[2:] == pytest.approx([1e-6, 2e-6])
    lines = {line.get_label(): line for line in shares.get_lines()}
    assert list(lines["largest of 3 cases"].get_ydata()) == pytest.approx([7.0] * 4)
    assert list(lines["limit"].get_ydata()) == [1, 1]
    assert list(lines["first divergent"].get_xdata()) == [2, 2]
    assert [list(line.get_xdata()) for line in errors.get_lines() if line.get_linestyle() == "-"][3:] == [
        [0, 1, 2, 3], [1.5, 1.5]]  # the median, and what stands between the encoders
    low, high = shares.get_ylim()
    assert low < 0.4 and high > 7


def test_the_limit_is_in_the_figure_however_small_the_shares():
    _, shares = plot.figure_of([a_row("1", layers=layers(TEXT, share=1e-4))], plot.Layers(tuple(TEXT), "visual")).axes
    low, high = shares.get_ylim()
    assert low < 1e-4 and high > 1


@pytest.mark.parametrize("error", [0.0, 5e-324, 1e308, math.nan, math.inf, None])
def test_errors_that_a_logarithm_has_no_place_for(config, error):
    row = a_row("1", layers=[{"name": name, "error": error} for name in TEXT])
    svg_of(plot.draw([row], plot.Layers(tuple(TEXT), "visual")))
    errors, _ = plot.figure_of([row], plot.Layers(tuple(TEXT), "visual")).axes
    value = errors.get_lines()[0].get_ydata()[0]
    low, high = errors.get_ylim()
    assert (0 <= value < low) if error in (0, 5e-324) else (low < value < high or math.isnan(value))


def test_names_in_the_plot_are_text_and_nothing_else():
    names = ["visual.<b>$x$ & 1", f"model.{ATTACK}"]
    rows = [diverged("1", names[0], layers=layers(names))]
    svg = plot.draw(rows, plot.Layers(tuple(names), "visual"))
    words = {"".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter()}
    assert {"<b>$x$ & 1", ATTACK, f"first divergent module: {names[0]}"} <= words and "<b>" not in svg


def test_many_layers_keep_their_labels_apart():
    names = [f"visual.blocks.{n}" for n in range(32)] + ["visual.merger"] + [f"model.layers.{n}" for n in range(80)]
    _, shares = plot.figure_of([a_row("1", layers=layers(names))], plot.Layers(tuple(names), "visual")).axes
    ticks = sorted(shares.get_xticks())
    assert 25 < len(ticks) <= 42 and min(np.diff(ticks)) >= 3


def test_without_layers_there_is_no_plot(config):
    page = report.render(config, [a_row("1", layers=[]), {"id": "4", "error": "none"}], SUMMARY)
    assert "<svg" not in page and "No layer was compared" in page


def test_what_is_missing_is_left_out(config):
    said = Page(report.render(config, [{"id": "1"}, {}], {})).text
    assert said["h1"] == "Did not hold" and "Not compared." in said["body"] and "Not stated." in said["body"]
    assert Page(report.render(config, [], {"passed": True})).text["h1"] == "Held"


def test_tables_of_weights_and_ranks(config):
    row = a_row("1", layers=[])
    page = report.render(config, [row], SUMMARY | {"reassembly": DIFFERING})
    cells = re.findall(r"<td>(.*?)</td>", page.split("Weights put together again")[1].split("<article")[0])
    assert cells == ["model.norm.weight", "2", "a bit &lt;flipped&gt;", "1", "7–13", "1", "none", "1,234,567"]
    assert "not the checkpoint" in page and "equal to the checkpoint" not in page
    assert "equal to the checkpoint" in report.render(config, [row], SUMMARY)


def test_without_matplotlib_it_says_what_to_do(config, monkeypatch):
    plot.require_matplotlib()
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.require_matplotlib()
    with pytest.raises(UserError, match="pip install matplotlib"):
        report.render(config, [a_row("1")], SUMMARY)
