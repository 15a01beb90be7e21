"""A small synthetic corpus in SlimPajama's schema, so that the whole path runs without a download.

Seven domains from seven little grammars; no text is real. A document is a function of (seed, domain, number) alone.
Each is labelled in meta.kind, in known shares: `ordinary`; `redundant`, a boilerplate notice or a near-copy of one of
four master documents; `noise`, an ordinary document with its words shuffled or its characters corrupted. So one can
see what a reweighting strategy does to each kind.
"""

import random
from collections.abc import Callable, Iterator

NOTE = "synthetic text made by sample_corpus.py for tests and demonstrations; not SlimPajama"
KINDS = {"ordinary": 0.70, "redundant": 0.20, "noise": 0.10}  # share of each domain's documents, in both splits
MASTERS = 4  # documents per domain that near-copies are made of


def words(text: str) -> list[str]:
    return text.split()


SYLLABLES = words("ba bel bor ca chen da del dor el fa fen gor gran ha hol il ka kel la len lor ma mir mon na nor o "
                  "pel ra ren ros sa sel sha tal tem tor u va vel vin wen yar zan")
FIRST = words("Ada Bruno Clara Dov Elin Farid Greta Hugo Ines Jonas Karin Lev Mara Nils Olga Pavel Rosa Sven Yara")
ADJECTIVES = words("old quiet narrow bright heavy distant pale sudden empty crooked gentle bitter golden cold silent "
                   "patient broken weary restless hollow")
NOUNS = words("door river lamp garden letter window horse winter bridge clock stranger kitchen shadow promise orchard "
              "staircase harbour mirror candle coat village storm sister road")
VERBS = words("opened crossed carried remembered followed watched forgot lifted counted buried mended feared praised "
              "painted missed answered")
PRODUCTS = words("kettle backpack mattress blender sofa drill stroller helmet camera vacuum tent printer heater "
                 "bicycle monitor jacket")
TASKS = words("clean store repair choose compare wash assemble adjust replace insure return measure paint charge")
TOPICS = words("budget transport housing harvest energy water schools hospital election tourism fishing railway "
               "broadband recycling flood airport")
BODIES = words("council ministry union committee agency court parliament company university police")
CODE_NOUNS = words("buffer index token record queue node cache value item batch graph path weight offset header frame "
                   "chunk key count state")
CODE_VERBS = words("load parse merge update split flush encode find count build check reset sort filter apply")
TOOLS = words("kernel driver compiler terminal router database browser debugger container firewall scheduler plugin")
SYMBOLS = words(r"\alpha \beta \gamma \lambda \mu \sigma \phi \omega x y z f g u v")
SPACES = words(r"\mathbb{R}^n L^2(\Omega) H^1 C^k(M) \ell^p X Y V^*")
CLAIMS = words("compact continuous bounded convex measurable separable complete reflexive smooth coercive monotone")


def name(rng: random.Random, parts: int = 2) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(parts)).capitalize()


def arxiv(rng: random.Random) -> str:
    """LaTeX: theorems and proofs over a few symbols that stay the same within a document."""
    a, b, c = rng.sample(SYMBOLS, 3)
    space, claim, author = rng.choice(SPACES), rng.choice(CLAIMS), name(rng)
    out = [rf"\section{{On {claim} operators of {author} type}}", rf"Let ${a} \in {space}$ and let ${b}$ be {claim}."]
    for i in range(rng.randint(4, 9)):
        n, p = rng.randint(2, 9), rng.randint(1, 4)
        out.append(rf"\begin{{theorem}}\label{{thm:{i + 1}}}" + "\n" +
                   rf"If ${b}$ is {rng.choice(CLAIMS)}, then " +
                   rf"$\| {a}_{{{n}}} \|_{{{space}}} \le {n} \| {b} \|^{{{p}}}$." +
                   "\n\\end{theorem}\n\\begin{proof}\n" +
                   rf"By Theorem~\ref{{thm:{max(1, i)}}} and the inequality of {author}," + "\n\\[\n  " +
                   rf"\int_\Omega |{a} - {b}_{{{n}}}|^{{{p}}} \, d{c} = " +
                   rf"\sum_{{k=1}}^{{{n}}} \frac{{{c}_k}}{{k^{{{p}}}}}"
                   + f" \\to 0 .\n\\]\nHence ${a}$ is {rng.choice(CLAIMS)}.\n\\end{{proof}}")
    return "\n".join(out)


def book(rng: random.Random) -> str:
    """Prose: long sentences and dialogue between two people."""
    people, out = rng.sample(FIRST, 2), []
    for _ in range(rng.randint(6, 14)):
        who, other = rng.sample(people, 2)
        scene = (f"{who} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}, and for a long while "
                 f"nobody spoke, since the {rng.choice(NOUNS)} was {rng.choice(ADJECTIVES)} and the "
                 f"{rng.choice(NOUNS)} still {rng.choice(ADJECTIVES)}.")
        speech = (f'"You {rng.choice(VERBS)} my {rng.choice(NOUNS)}," said {other}, "as one who never '
                  f'{rng.choice(VERBS)} a {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."')
        out.append(scene + (" " + speech if rng.random() < 0.6 else ""))
    return "\n\n".join(out)


def cc(rng: random.Random) -> str:
    """A news page: navigation, byline, short paragraphs about one topic."""
    topic, body, town, who = rng.choice(TOPICS), rng.choice(BODIES), name(rng, 3), f"{rng.choice(FIRST)} {name(rng)}"
    out = [f"Home > News > {topic.title()} > {town}", f"{town} {body} votes on {topic} plan",
           f"By {who} | {rng.randint(1, 28)} {rng.choice(words('March May June October'))} {rng.randint(2004, 2019)}"]
    for _ in range(rng.randint(5, 10)):
        percent, cost = rng.randint(2, 90), rng.randint(3, 400)
        out.append(f"The {rng.choice(BODIES)} said on {rng.choice(words('Monday Tuesday Thursday Friday'))} that "
                   f"{rng.choice(TOPICS)} spending in {town} had {rng.choice(('risen', 'fallen'))} by {percent} "
                   f"per cent, to ${cost} million. {who.split()[1]} called the {topic} plan "
                   f"{rng.choice(words('overdue costly modest historic unfair'))}.")
    return "\n".join([*out, "Share | Print | Comments (" + str(rng.randint(0, 99)) + ")"])


def c4(rng: random.Random) -> str:
    """Advice in the second person about one product."""
    product, brand = rng.choice(PRODUCTS), name(rng)
    out = [f"{rng.randint(3, 12)} ways to {rng.choice(TASKS)} your {product}"]
    for _ in range(rng.randint(6, 12)):
        out.append(rng.choice((
            f"If you want to {rng.choice(TASKS)} your {product}, make sure that you {rng.choice(TASKS)} it before you "
            f"{rng.choice(TASKS)} the {rng.choice(PRODUCTS)}!",
            f"Our {brand} {product} is {rng.choice(words('light sturdy affordable waterproof stylish'))}, so you can "
            f"{rng.choice(TASKS)} it in {rng.randint(2, 59)} minutes.",
            f"Don't forget: a {product} from {brand} ships free, and you will love how easy it is to "
            f"{rng.choice(TASKS)}.")))
    return " ".join(out)


def github(rng: random.Random) -> str:
    """Python-like code: functions whose names, arguments and bodies agree."""
    out = [f"import {rng.choice(CODE_NOUNS)}s", ""]
    for _ in range(rng.randint(4, 9)):
        verb, (a, b, c) = rng.choice(CODE_VERBS), rng.sample(CODE_NOUNS, 3)
        out += [f"def {verb}_{a}({a}, {b}=None, n={rng.randint(0, 64)}):", f'    """{verb.capitalize()} the {a}."""',
                f"    {c} = []", f"    for i in range(len({a})):",
                f"        if {a}[i] {rng.choice(words('== < > !='))} n and {b} is not None:",
                f"            {c}.append({a}[i] {rng.choice(words('+ - * %'))} {rng.randint(1, 9)})"]
        out += [f"    return {c}", ""] if rng.random() < 0.7 else [
            f"    assert {c}, '{c} is empty'", f"    return self.{rng.choice(CODE_VERBS)}_{c}({c}, n)", ""]
    return "\n".join(out)


def stackexchange(rng: random.Random) -> str:
    """A question about a tool and its answers."""
    tool, other, code = rng.choice(TOOLS), rng.choice(TOOLS), f"E{rng.randint(100, 999)}"
    out = [f"Q: {tool.capitalize()} fails with {code} after updating the {other}\n\nI am using {tool} "
           f"{rng.randint(1, 9)}.{rng.randint(0, 20)} and get {code} whenever I start the {other}. "
           f"What am I doing wrong? I already tried to restart the {rng.choice(TOOLS)}."]
    for _ in range(rng.randint(3, 7)):
        out.append(f"A: {rng.choice(('You need to', 'Try to', 'As a workaround,'))} disable the {rng.choice(TOOLS)} "
                   f"and run `{tool} --{rng.choice(CODE_VERBS)}-{other} {rng.randint(1, 64)}`. {code} means that the "
                   f"{other} cannot reach the {rng.choice(TOOLS)}; see the {tool} manual, page {rng.randint(1, 12)}.")
    return "\n\n".join(out)


def wikipedia(rng: random.Random) -> str:
    """An entry about a town, its figures repeated across sections."""
    town, region, river = name(rng, 3), name(rng, 2), name(rng, 2)
    year, people = rng.randint(900, 1890), rng.randint(800, 90_000)
    out = [f"{town} is a town in the {rng.choice(words('north south east west'))} of {region}. "
           f"In {rng.randint(1990, 2018)} it had a population of {people:,}. It lies on the river {river}.", "History",
           f"{town} was first mentioned in {year}. It received market rights in {year + rng.randint(20, 120)}."]
    for _ in range(rng.randint(4, 8)):
        century = rng.randint(11, 20)
        out.append(f"In the {century}th century the {rng.choice(BODIES)} of {region} built a "
                   f"{rng.choice(words('church mill castle chapel school station theatre'))} in {town}, designed by "
                   f"{rng.choice(FIRST)} {name(rng)} (born {century * 100 - rng.randint(20, 99)}).")
    return "\n".join([*out, "Geography", f"The {river} flows through {town} for {rng.randint(2, 40)} km before it "
                      f"leaves {region}."])


GRAMMARS: dict[str, Callable[[random.Random], str]] = {
    "RedPajamaArXiv": arxiv, "RedPajamaBook": book, "RedPajamaCommonCrawl": cc, "RedPajamaC4": c4,
    "RedPajamaGithub": github, "RedPajamaStackExchange": stackexchange, "RedPajamaWikipedia": wikipedia,
}


def redundant(seed: int, domain: str, rng: random.Random) -> str:
    """A near-copy of one of the domain's masters, three words in a hundred changed; every other one under a notice."""
    master = GRAMMARS[domain](random.Random(f"{seed}/{domain}/master {rng.randrange(MASTERS)}"))
    parts = master.split(" ")
    for i in rng.sample(range(len(parts)), max(1, len(parts) * 3 // 100)):
        parts[i] = rng.choice(NOUNS)
    notice = (f"{domain} notice. This copy is provided as is, without warranty of any kind. All rights reserved. "
              "By using it you agree to the terms of use and to the storage of cookies on your device.\n")
    return notice * rng.randrange(2) + " ".join(parts)


def noise(domain: str, rng: random.Random) -> str:
    """An ordinary document with its words shuffled, or every third character replaced."""
    text = GRAMMARS[domain](rng)
    if rng.random() < 0.5:
        parts = text.split()
        return " ".join(rng.sample(parts, len(parts)))
    return "".join(chr(rng.randrange(33, 127)) if rng.random() < 1 / 3 else c for c in text)


def documents(seed: int = 0, documents_per_domain: int = 600) -> Iterator[tuple[str, dict]]:
    """(split, record) pairs, the domains in turn; every tenth document is for validation."""
    kinds = {}  # (domain, split) -> kinds in a seeded order, in exact shares
    for domain in GRAMMARS:
        for split, n in (("validation", documents_per_domain // 10),
                         ("train", documents_per_domain - documents_per_domain // 10)):
            counts = {kind: round(share * n) for kind, share in KINDS.items() if kind != "ordinary"}
            row = [kind for kind, count in counts.items() for _ in range(count)]
            row += ["ordinary"] * (n - len(row))
            kinds[domain, split] = iter(random.Random(f"{seed}/{domain}/{split}").sample(row, n))
    for i in range(documents_per_domain):
        for domain, grammar in GRAMMARS.items():
            split, rng = "validation" if i % 10 == 9 else "train", random.Random(f"{seed}/{domain}/{i}")
            kind = next(kinds[domain, split])
            if kind == "ordinary":
                text = grammar(rng)
            else:
                text = redundant(seed, domain, rng) if kind == "redundant" else noise(domain, rng)
            yield split, {"text": text, "meta": {"redpajama_set_name": domain, "kind": kind}}
