"""The HTML page about runs: its content, and that it loads nothing and runs no script of others."""

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import command, expect_error, expect_ok
from test_tables_plots import make_run

VOID = {"meta", "input", "br"}
LOADING = "link img image iframe object embed use base video audio source form"
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """The elements of a page in the order of their ends: (tag, attributes, text inside).

    Fails where a tag is not closed in its place.
    """

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

    def all(self, tag: str, **wanted) -> list[tuple[dict, str]]:
        elements = [(attrs, text) for name, attrs, text in self.elements if name == tag]
        return [(attrs, text) for attrs, text in elements if wanted.items() <= attrs.items()]

    @property
    def header(self) -> str:
        ((_, text),) = self.all("header")
        return text

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
            elif "data-points" in attrs and captions[-1] == figure:
                pairs = [pair.split(",") for pair in attrs["data-points"].split()]
                points = [[float(x), float(y)] for x, y in pairs]
                lines.append((attrs["data-name"], points))
        return lines


def add_lines(folder, *records):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def add_fewshot(folder, shots=5, step=9, **scores):
    tasks = {}
    for task, (metric, score) in scores.items():
        tasks[task] = {
            "metric": metric,
            "score": score,
            "stderr": 0.01,
            "requests": 1000,
            "truncated": 7,
            "higher_is_better": "perplexity" not in metric,
        }
    record = {"step": step, "num_fewshot": shots, "tasks": tasks}
    (folder / "eval" / "fewshot.json").write_text(json.dumps(record))


def report(out, *runs) -> Page:
    printed = expect_ok(command("eval/report.py", *runs, "--out", out))
    assert printed.split() == [str(out)]
    return Page(out.read_text())


@pytest.fixture
def runs(tmp_path):
    losses_a = [1.0, 2.0, 3.0, 1.5, 1.5, 1.5, 1.5]
    losses_b = [1.1, 1.9, 2.5, 1.5, 1.5, 1.5, 1.5]
    return [
        make_run(tmp_path / "a", losses_a, command="train.py --seed 1"),
        make_run(tmp_path / "b", losses_b, reweight="linupper", kinds=True),
    ]


def test_tables_and_curves(runs, tmp_path):
    page = report(tmp_path / "r.html", *runs)
    rows = page.rows()
    perplexity, loss, bits, difference = rows["arxiv"]
    assert perplexity == [f"*{math.e:.3f}*", f"{math.exp(1.1):.3f}"]
    assert loss == ["*1.0000*", "1.1000"]
    assert bits == [f"*{1 / math.log(2):.4f}*", f"{1.1 / math.log(2):.4f}"]
    assert difference == ["+0.1000"]
    assert rows["average loss"][1] == ["-0.0714"]
    assert rows["a"][0][:2] == ["uniform", "1"]
    assert rows["a"][0][-2:] == ["1.7143", "5"]
    assert "Lowest average loss, tiny: linupper, 1.6429" in page.all("section")[0][1]
    assert "python train.py --seed 1\n" in page.all("pre")[-1][1]

    steps = range(1, 10)
    uniform, linupper = page.lines("book")[:2]
    assert uniform == ("uniform", [[5, 2.0], [9, 2.0]])
    assert linupper == ("linupper", [[5, 1.9], [9, 1.9]])
    sample_sizes = page.lines("effective sample size (share of the batch)")
    assert sample_sizes[1] == ("linupper", [[step, 0.9] for step in steps])
    shares = page.lines("wikipedia")[-1]
    assert shares == ("linupper", [[step, 1.0] for step in steps])
    assert [name for name, _ in page.lines("noise")] == ["linupper"]
    assert page.lines("training loss, unweighted (nats)") == []


def test_it_loads_nothing(runs, tmp_path):
    page = report(tmp_path / "r.html", *runs)
    text = (tmp_path / "r.html").read_text()
    assert not {tag for tag, *_ in page.elements} & set(LOADING.split())
    ids = {f"#{attrs.get('id')}" for _, attrs, _ in page.elements}
    links = []
    for tag, attrs, _ in page.elements:
        links += [(tag, value) for key, value in attrs.items() if is_link(key)]
    assert links
    for tag, target in links:
        assert tag == "a"
        assert target in ids or target == "https://arxiv.org/abs/2502.06733"
    for loading in ("@import", "@font-face", "import(", "fetch(", "XMLHttpRequest", "WebSocket"):
        assert loading not in text
    assert not re.search(r"url\((?!#chart)", text)

    ((_, script),) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "$" not in text.replace(script, "")  # every place of the template is filled


def is_link(attribute: str) -> bool:
    return re.search("src|href|action|data$", attribute) is not None


def test_what_run_folders_say_is_only_text(tmp_path):
    a = make_run(
        tmp_path / "<script>alert(2)<", [1.0] * 7, data_dir=EVIL, command=EVIL, max_steps=20
    )
    b = make_run(tmp_path / "b", [1.5] * 7, reweight=EVIL, data_dir="&amp;")
    add_fewshot(a, **{EVIL: (EVIL, 0.5)})
    shares = {"weight_by_kind": {EVIL: 1.0}, "samples_by_kind": {EVIL: 1.0}}
    add_lines(a, {"kind": "train", "step": 9, **shares})
    page = report(tmp_path / "r.html", a, b)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    for _, attrs, _ in page.elements:
        assert not any(key.startswith("on") for key in attrs)
    assert page.rows()[a.name]
    assert f"{a.name}: evaluated" in page.header
    assert EVIL in page.all("h1")[0][1]
    assert page.lines(EVIL)
    assert "&amp;" in page.rows()["b"][0]
    assert EVIL in page.all("pre")[-1][1]


def test_names_of_domains_and_runs_are_only_text(tmp_path):
    """In every place that shows them: text, attributes and the charts' data."""
    domain = "</script><script>alert(1)</script>&amp;\"'--><img src=x onerror=alert(1)>$x^2$"
    name = "\"><img src=x onerror=alert(3)>&lt;'"
    domains = ("c4", domain)
    config = {"model": domain, "mixture": name, "device": name, "world_size": 2}
    config |= {"versions": {name: domain}, "git_commit": name, "command": domain}
    runs = []
    for strategy, seed in ((name, 1), (f"{name} {domain}", 1), (name, 2)):
        folder = make_run(
            tmp_path / f"{name}{len(runs)}",
            [1.0, 2.0 + len(runs)],
            domains=domains,
            reweight=strategy,
            seed=seed,
            **config,
            **{domain: strategy},
        )
        runs.append(folder)
    (runs[1] / "eval" / "perplexity.json").unlink()
    page = report(tmp_path / "r.html", *runs)  # every tag is closed in its place

    ((attrs, _),) = page.all("script")
    assert attrs == {}
    assert not page.all("img")
    for tag, attrs, _ in page.elements:
        assert not any(key.startswith("on") for key in attrs)
        assert "alert" not in tag + "".join(attrs)
    for kind in ("ppl", "loss", "bits_per_byte"):
        (tab,) = page.all("div", **{"class": f"tab {kind}"})
        assert tab[1].count(domain) >= 3  # the title, the row, and which domain is the worst
    captions = [text for _, text in page.all("figcaption")]
    assert captions.count(domain) == 2  # the loss and the share of the weight
    labels = [attrs["aria-label"] for attrs, _ in page.all("svg", role="img")]
    assert labels.count(domain) == 2
    assert domain in [text for _, text in page.all("th", scope="col")]  # a key of config.json
    notes = [text for _, text in page.all("p", **{"class": "muted"})]
    assert any(f"over seeds ({name}" in text for text in notes)
    settings = {setting for setting, _ in page.lines(domain)}
    assert len(settings) == 2 and all(setting.startswith(name) for setting in settings)
    assert {run.name for run in runs} <= page.rows().keys()
    summaries = [text for _, text in page.all("summary")]
    assert summaries == [f"config of {run.name}" for run in runs]
    for fact in (domain, name, f"{name} {domain}"):
        assert any(fact in text for _, text in page.all("dd"))
    assert f"{runs[1].name} is not evaluated" in page.header
    assert f"-- {domain}\n" in page.all("pre")[-1][1]
    assert page.all("title")[0][1].startswith(name) and page.all("h1")[0][1].startswith(name)
    assert page.all("p", **{"class": "lead"})[1][1].startswith(f"Average loss, {name}")


def test_seeds_are_one_setting(tmp_path):
    folders = []
    for strategy, loss in (("uniform", 1.0), ("upper", 1.5)):
        for seed in (1, 2, 3):
            folder = tmp_path / f"{strategy}{seed}"
            losses = [loss + seed / 10] * 7
            folders.append(make_run(folder, losses, reweight=strategy, seed=seed))
    page = report(tmp_path / "r.html", *folders)
    assert page.rows()["cc"][1] == ["*1.2000 ± 0.1000*", "1.7000 ± 0.1000"]
    names = [name for name, _ in page.lines("cc")[:6]]
    assert names == ["uniform"] * 3 + ["upper"] * 3
    styles = {attrs["style"] for attrs, _ in page.all("g", **{"data-name": "upper"})}
    assert len(styles) == 1
    assert "--c1" in styles.pop()
    assert "single seed" not in page.header


def test_fewshot(runs, tmp_path):
    out = tmp_path / "r.html"
    assert "Few-shot" not in report(out, *runs).all("nav")[0][1]
    of_a = {"sciq": ("acc,none", 0.5), "lambada": ("perplexity,none", 40.0)}
    of_b = {"sciq": ("acc,none", 0.25), "lambada": ("perplexity,none", 50.0)}
    add_fewshot(runs[0], **of_a)
    add_fewshot(runs[1], **of_b, piqa=("acc,none", 0.6), step=4)
    again = make_run(tmp_path / "c", [1.2] * 7, reweight="linupper", seed=2)
    add_fewshot(again, sciq=("acc,none", 0.35), step=4)
    page = report(out, *runs, again)
    rows = page.rows()
    assert rows["sciq (acc)"] == [["*0.5000 (0.0100)*", "0.3000 ± 0.0707"]]
    assert rows["lambada (perplexity)"] == [["*40.0000 (0.0100)*", "50.0000 (1 of 2 runs)"]]
    assert rows["piqa (acc)"] == [["missing", "0.6000 (1 of 2 runs)"]]
    assert "b: few-shot scores taken at step 4 of 9" in page.header


def test_missing_says_missing(runs, tmp_path):
    bare = make_run(tmp_path / "c", None, reweight="upper")
    page = report(tmp_path / "r.html", runs[0], bare)
    assert page.rows()["arxiv"][0] == ["2.718", "missing"]
    assert page.rows()["c"][0][-4:] == ["missing"] * 4
    assert f"c is not evaluated: python eval/perplexity.py --run {bare}" in page.header
    assert "upper (missing)" in page.all("div", **{"class": "legend"})[0][1]
    alone = report(tmp_path / "r.html", bare)
    assert "missing: no run is evaluated yet" in alone.all("section")[0][1]
    assert "mean of the domainsmissing" in alone.all("section")[1][1]


def test_notes(runs, tmp_path):
    short = make_run(tmp_path / "c", [1.0] * 7, max_steps=20)
    add_lines(short, {"kind": "skip", "step": 8, "reason": "loss", "samples": []})
    header = report(tmp_path / "r.html", runs[1], short).header
    assert "c: evaluated at step 9 of 20" in header
    assert "c is not finished: step 9 of 20" in header
    assert "c: skipped steps" in header
    assert "single seed" in header
    assert "different windows" not in header
    other = make_run(tmp_path / "d", [1.0] * 7, val_hash="other")
    (other / "eval" / "perplexity.json").unlink()
    header = report(tmp_path / "r.html", runs[0], other).header
    assert "curves are of different windows" in header


def test_histograms_share_their_bins(runs, tmp_path):
    ones = {"low": 0.5, "high": 1.5, "counts": [0, 9, 0]}
    losses = [
        {"low": 0.0, "high": 1.0, "counts": [1, 3]},
        {"low": 1.0, "high": 2.0, "counts": [4, 4]},
    ]
    weights = [ones, {"low": 0.0, "high": 4.0, "counts": [6, 2]}]
    for run, loss, weight in zip(runs, losses, weights, strict=True):
        earlier = {"kind": "histogram", "step": 5, "loss": ones, "weight": ones}
        last = {"kind": "histogram", "step": 9, "loss": loss, "weight": weight}
        add_lines(run, earlier, last)
    page = report(tmp_path / "r.html", *runs)

    (_, first), (_, second) = page.lines("% of samples by loss, last evaluation")
    middles = [0.02 + 0.04 * i for i in range(50)]
    assert [x for x, _ in first] == [x for x, _ in second] == pytest.approx(middles)

    def percent_below(points, x):
        return pytest.approx(
            sum(y for other, y in points if other < x), abs=5
        )  # a bin may straddle x

    assert percent_below(first, 0.5) == 25
    assert percent_below(first, 1.0) == 100
    assert percent_below(second, 1.0) == 0
    assert percent_below(second, 1.5) == 50
    assert sum(y for _, y in second) == pytest.approx(100)
    # The weights of uniform are all 1: no line.
    ((name, points),) = page.lines("% of samples by weight, last evaluation")
    assert name == "linupper"
    assert points[0][1] == pytest.approx(3)


def test_a_diverged_run_is_drawn_where_it_is_finite(tmp_path):
    run = make_run(tmp_path / "a", [700.0] * 7)
    record = {"kind": "eval", "domains": {}, "val_hash": "same"}
    add_lines(run, {**record, "step": 10, "mean_loss": math.nan})
    add_lines(run, {**record, "step": 11, "mean_loss": 1.0})
    lines = report(tmp_path / "r.html", run).lines("mean of the domains")
    assert lines == [("uniform", [[5, 700], [9, 700], [11, 1]])]


def test_long_runs_are_thinned(runs, tmp_path):
    record = {"kind": "train", "loss": 3.0, "tokens_per_s": 5.0}
    steps = range(10, 10_001, 10)
    add_lines(runs[0], *({**record, "step": step, "tokens": step} for step in steps))
    ((_, points),) = report(tmp_path / "r.html", *runs).lines("training loss, unweighted (nats)")
    assert 100 <= len(points) <= 150
    assert points[0] == [10, 3.0]
    assert points[-1] == [10_000, 3.0]


def test_same_runs_same_bytes_and_an_older_page_is_replaced(runs, tmp_path):
    out = tmp_path / "r.html"
    files_before = {path.name for path in tmp_path.iterdir()}
    out.write_text("older")
    report(out, *runs)
    first = out.read_bytes()
    page = report(out, *runs)
    assert out.read_bytes() == first
    assert b"older" not in first
    assert {path.name for path in tmp_path.iterdir()} == {*files_before, "r.html"}
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


# In a browser

WIDTHS = "paths => paths.map(path => path.getBoundingClientRect().width)"
COLOURS = """() => [
    getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector('.plot text')).fill,
    ...[...document.querySelectorAll('.line path')].map(line => getComputedStyle(line).stroke),
]"""


def test_in_a_browser(runs, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium")
    out = tmp_path / "r.html"
    report(out, *runs)
    with playwright.sync_playwright() as engines:
        browser = engines.chromium.launch(executable_path=chromium)
        light = look(browser, out, 1280, "light")
        dark = look(browser, out, 390, "dark")
        browser.close()
    assert len(light) > 20
    assert not any(a == b for a, b in zip(light, dark, strict=True))


def look(browser, out, width: int, scheme: str) -> list[str]:
    """Check the page on a screen of this width; its colors: of the page, a text, and all lines."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(out.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert min(page.locator(".plot .line path").evaluate_all(WIDTHS)) > 200

    # Point at the middle of the first chart, which has the steps 0, 5 and 9.
    page.locator(".plot").first.hover()
    tip = page.locator("#tip div").all_text_contents()
    assert tip == ["step 5", "uniform: 1.714", "linupper: 1.643"]
    assert requests == [out.as_uri()]
    assert not messages
    colours = page.evaluate(COLOURS)
    page.close()
    return colours


def test_mistakes(runs, tmp_path):
    out = tmp_path / "r.html"
    other = make_run(tmp_path / "other", [1.0] * 7, val_hash="other")
    wrong = [
        ([runs[0], other, "--out", out], ["cannot be compared"]),
        ([tmp_path / "nowhere", "--out", out], ["nowhere", "no config.json"]),
        ([tmp_path, "--out", out], ["no config.json"]),
        ([runs[0], "--out", tmp_path / "no" / "r.html"], ["--out", "No such file"]),
        ([runs[0], "--out", tmp_path], ["--out", "is a folder"]),
        (["--out", out], ["RUN"]),
    ]
    for args, words in wrong:
        expect_error(command("eval/report.py", *args), *words)
    assert not out.exists()
