"""The HTML page about runs: what it shows, and that it loads nothing and runs nothing of what it shows."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from conftest import command, expect_error, expect_ok
from test_tables_plots import make_run

VOID = {"meta", "input", "br"}
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """The elements of a page as (tag, attributes, text in it) in the order of their ends; fails on unbalanced tags."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.open.append((tag, dict(attrs), []))
        if tag in VOID:
            self.elements.append((tag, dict(attrs), ""))
            self.open.pop()

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag):
        opened, attrs, text = self.open.pop()
        assert opened == tag, (opened, tag)
        self.elements.append((tag, attrs, "".join(text)))

    def handle_data(self, data):
        for *_, text in self.open:
            text.append(data)

    def all(self, tag: str, **attrs) -> list[tuple[dict, str]]:
        return [(a, text) for t, a, text in self.elements if t == tag and attrs.items() <= a.items()]

    def rows(self) -> dict[str, list[list[str]]]:
        """First cell -> cells of each row that begins with it; a cell in bold in stars."""
        rows, cells = {}, []
        for tag, attrs, text in self.elements:
            if tag in ("th", "td"):
                cells.append(f"*{text}*" if attrs.get("class") == "best" else text.strip())
            elif tag == "tr":
                rows.setdefault(cells[0], []).append(cells[1:])
                cells = []
        return rows

    def lines(self, figure: str) -> list[tuple[str, list[list[float]]]]:
        """(setting, points) of each line in the figure with this caption."""
        captions, lines = [], []
        for tag, attrs, text in self.elements:
            if tag == "figcaption":
                captions.append(text)
            elif tag == "polyline" and "data-name" in attrs and captions[-1] == figure:
                points = [list(map(float, p.split(","))) for p in attrs["points"].split()]
                lines.append((attrs["data-name"], points))
        return lines


def add_lines(folder, *records):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def add_fewshot(folder, shots=5, step=9, **scores):
    tasks = {task: {"metric": metric, "score": score, "stderr": 0.01, "requests": 1000, "truncated": 7,
                    "higher_is_better": "perplexity" not in metric}
             for task, (metric, score) in scores.items()}
    (folder / "eval" / "fewshot.json").write_text(json.dumps({"step": step, "num_fewshot": shots, "tasks": tasks}))


def report(out, *runs) -> Page:
    assert expect_ok(command("eval/report.py", *runs, "--out", out)).split() == [str(out)]
    return Page(out.read_text())


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / "a", [1.0, 2.0, 3.0, 1.5, 1.5, 1.5, 1.5], command="train.py --seed 1"),
            make_run(tmp_path / "b", [1.1, 1.9, 2.5, 1.5, 1.5, 1.5, 1.5], reweight="linupper", kinds=True)]


def test_tables_and_curves(runs, tmp_path):
    page = report(tmp_path / "r.html", *runs)
    perplexity, loss, bits, difference = page.rows()["arxiv"]
    assert perplexity == [f"*{math.e:.3f}*", f"{math.exp(1.1):.3f}"] and loss == ["*1.0000*", "1.1000"]
    assert bits == [f"*{1 / math.log(2):.4f}*", f"{1.1 / math.log(2):.4f}"]
    assert difference == ["+0.1000"] and page.rows()["average loss"][1] == ["-0.0714"]
    assert page.rows()["a"][0][:2] == ["uniform", "1"] and page.rows()["a"][0][-2:] == ["1.7143", "5"]
    assert "Lowest average loss, tiny: linupper, 1.6429" in page.all("section")[0][1]
    assert page.lines("book")[:2] == [(name, [[step, v] for step in (0, 5, 9)]) for name, v in
                                      (("uniform", 2.0), ("linupper", 1.9))]
    assert page.lines("effective sample size (share of the batch)")[1] == ("linupper", [[s, 0.9] for s in range(1, 10)])
    assert page.lines("wikipedia")[-1] == ("linupper", [[s, 1.0] for s in range(1, 10)])  # equal shares
    assert [name for name, _ in page.lines("noise")] == ["linupper"]
    assert page.lines("training loss, unweighted (nats)") == []
    assert "python train.py --seed 1\n" in page.all("pre")[-1][1]


def test_nothing_from_elsewhere(runs, tmp_path):
    page = report(tmp_path / "r.html", *runs)
    text = (tmp_path / "r.html").read_text()
    assert not {t for t, *_ in page.elements} & {"link", "img", "image", "iframe", "object", "embed", "use", "base",
                                                 "video", "audio", "source", "form"}
    links = [(t, k, v) for t, a, _ in page.elements for k, v in a.items() if re.search("src|href|action|data$", k)]
    assert links and all(t == "a" and (v.startswith("#") or v == "https://arxiv.org/abs/2502.06733")
                         for t, _, v in links)
    assert {v for _, _, v in links if v[0] == "#"} <= {f"#{a.get('id')}" for _, a, _ in page.elements}
    assert not re.search(r"url\(|@import|@font-face|import\(|fetch\(|XMLHttpRequest|WebSocket", text)
    (_, script), = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "$" not in text.replace(script, "")  # every place of the form is filled


def test_what_run_folders_say_is_only_text(tmp_path):
    a = make_run(tmp_path / "<script>alert(2)<", [1.0] * 7, data_dir=EVIL, command=EVIL, max_steps=20)
    b = make_run(tmp_path / "b", [1.5] * 7, reweight=EVIL, data_dir="&amp;")
    add_fewshot(a, **{EVIL: (EVIL, 0.5)})
    add_lines(a, {"kind": "train", "step": 9, "weight_by_kind": {EVIL: 1.0}, "samples_by_kind": {EVIL: 1.0}})
    page = report(tmp_path / "r.html", a, b)
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not [k for _, attrs, _ in page.elements for k in attrs if k.startswith("on")]
    assert page.rows()[a.name] and f"{a.name}: evaluated" in page.all("header")[0][1]
    assert EVIL in page.all("h1")[0][1] and page.lines(EVIL)
    assert "&amp;" in page.rows()["b"][0] and EVIL in page.all("pre")[-1][1]


def test_seeds_are_one_setting(tmp_path):
    made = [make_run(tmp_path / f"{s}{k}", [gap + k / 10] * 7, reweight=s, seed=k)
            for s, gap in (("uniform", 1.0), ("upper", 1.5)) for k in (1, 2, 3)]
    page = report(tmp_path / "r.html", *made)
    assert page.rows()["cc"][1] == ["*1.2000 ± 0.1000*", "1.7000 ± 0.1000"]
    lines = page.lines("cc")[:6]
    assert [name for name, _ in lines] == ["uniform"] * 3 + ["upper"] * 3
    drawn = [a["style"] for a, _ in page.all("polyline") if a.get("data-name") == "upper"]
    assert len(set(drawn)) == 1 and "--c1" in drawn[0]
    assert "single seed" not in page.all("header")[0][1]


def test_fewshot(runs, tmp_path):
    assert "Few-shot" not in (report(tmp_path / "r.html", *runs).all("nav")[0][1])
    add_fewshot(runs[0], sciq=("acc,none", 0.5), lambada=("perplexity,none", 40.0))
    add_fewshot(runs[1], sciq=("acc,none", 0.25), lambada=("perplexity,none", 50.0), piqa=("acc,none", 0.6), step=4)
    page = report(tmp_path / "r.html", *runs)
    rows = page.rows()
    assert rows["sciq (acc)"] == [["*0.5000 (0.0100)*", "0.2500 (0.0100)"]]
    assert rows["lambada (perplexity)"] == [["*40.0000 (0.0100)*", "50.0000 (0.0100)"]]
    assert rows["piqa (acc)"] == [["missing", "0.6000 (0.0100)"]]
    assert "b: few-shot scores taken at step 4 of 9" in page.all("header")[0][1]
    again = make_run(tmp_path / "c", [1.2] * 7, reweight="linupper", seed=2)
    add_fewshot(again, sciq=("acc,none", 0.35), step=4)
    assert report(tmp_path / "r.html", *runs, again).rows()["sciq (acc)"][0][1] == "0.3000 ± 0.0707"


def test_missing_says_missing(runs, tmp_path):
    bare = make_run(tmp_path / "c", None, reweight="upper")
    page = report(tmp_path / "r.html", runs[0], bare)
    assert page.rows()["arxiv"][0] == ["2.718", "missing"]
    assert page.rows()["c"][0][-4:] == ["missing"] * 4
    assert f"c is not evaluated: python eval/perplexity.py --run {bare}" in page.all("header")[0][1]
    assert "upper (missing)" in page.all("div", **{"class": "legend"})[0][1]
    alone = report(tmp_path / "r.html", bare)
    assert "missing: no run is evaluated yet" in alone.all("section")[0][1]
    assert "mean of the domainsmissing" in alone.all("section")[1][1]


def test_notes(runs, tmp_path):
    short = make_run(tmp_path / "c", [1.0] * 7, max_steps=20)
    add_lines(short, {"kind": "skip", "step": 8, "reason": "loss", "samples": []})
    header = report(tmp_path / "r.html", runs[1], short).all("header")[0][1]
    for note in ("c: evaluated at step 9 of 20", "c is not finished: step 9 of 20", "c: skipped steps", "single seed"):
        assert note in header
    assert "different windows" not in header
    other = make_run(tmp_path / "d", [1.0] * 7, val_hash="other")
    (other / "eval" / "perplexity.json").unlink()
    assert "curves are of different windows" in report(tmp_path / "r.html", runs[0], other).all("header")[0][1]


def test_histograms_share_their_bins(runs, tmp_path):
    ones = {"low": 0.5, "high": 1.5, "counts": [0, 9, 0]}
    for run, loss, weight in ((runs[0], {"low": 0.0, "high": 1.0, "counts": [1, 3]}, ones),
                              (runs[1], {"low": 1.0, "high": 2.0, "counts": [4, 4]},
                               {"low": 0.0, "high": 4.0, "counts": [6, 2]})):
        add_lines(run, {"kind": "histogram", "step": 5, "loss": ones, "weight": ones},
                  {"kind": "histogram", "step": 9, "loss": loss, "weight": weight})
    page = report(tmp_path / "r.html", *runs)
    (_, first), (_, second) = page.lines("% of samples by loss, last evaluation")
    assert [x for x, _ in first] == [x for x, _ in second] == pytest.approx([0.02 + 0.04 * i for i in range(50)])
    for points, below, share in ((first, 0.5, 25), (first, 1.0, 100), (second, 1.0, 0), (second, 1.5, 50)):
        assert sum(y for x, y in points if x < below) == pytest.approx(share, abs=5)  # a bin across the border
    assert sum(y for _, y in second) == pytest.approx(100)
    (name, points), = page.lines("% of samples by weight, last evaluation")  # uniform's are all 1
    assert name == "linupper" and points[0][1] == pytest.approx(3)


def test_a_diverged_run_is_drawn_where_it_is_finite(tmp_path):
    run = make_run(tmp_path / "a", [700.0] * 7)
    add_lines(run, {"kind": "eval", "step": 10, "domains": {}, "mean_loss": math.nan, "val_hash": "same"},
              {"kind": "eval", "step": 11, "domains": {}, "mean_loss": 1.0, "val_hash": "same"})
    lines = report(tmp_path / "r.html", run).lines("mean of the domains")
    assert lines == [("uniform", [[0, 700], [5, 700], [9, 700], [11, 1]])]


def test_long_runs_are_thinned(runs, tmp_path):
    add_lines(runs[0], *({"kind": "train", "step": 10 * s, "loss": 3.0, "tokens": 10 * s, "tokens_per_s": 5.0}
                         for s in range(1, 1001)))
    (_, points), = report(tmp_path / "r.html", *runs).lines("training loss, unweighted (nats)")
    assert 100 <= len(points) <= 150 and points[0] == [10, 3.0] and points[-1][0] > 9900


def test_same_runs_same_bytes_and_an_older_page_is_replaced(runs, tmp_path):
    out, folder = tmp_path / "r.html", sorted(p.name for p in tmp_path.iterdir())
    out.write_text("older")
    report(out, *runs)
    first = out.read_bytes()
    report(out, *runs)
    assert out.read_bytes() == first and b"older" not in first
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*folder, "r.html"])
    ids = [a["id"] for _, a, _ in Page(first.decode()).elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_mistakes(runs, tmp_path):
    out = tmp_path / "r.html"
    other = make_run(tmp_path / "other", [1.0] * 7, val_hash="other")
    expect_error(command("eval/report.py", runs[0], other, "--out", out), "cannot be compared")
    expect_error(command("eval/report.py", tmp_path / "nowhere", "--out", out), "nowhere", "no config.json")
    expect_error(command("eval/report.py", tmp_path, "--out", out), "no config.json")
    expect_error(command("eval/report.py", runs[0], "--out", tmp_path / "no" / "r.html"), "--out", "No such file")
    expect_error(command("eval/report.py", runs[0], "--out", tmp_path), "--out", "is a folder")
    expect_error(command("eval/report.py", "--out", out), "RUN")
    assert not out.exists()
