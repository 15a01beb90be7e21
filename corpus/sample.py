"""A small synthetic corpus in SlimPajama's schema, so that everything runs without a download.

Seven little grammars make the seven domains; no text is real. A document depends only on the seed,
its domain and its number. Each is labeled in meta.kind, in fixed shares, so that one can see what a
reweighting strategy does to each kind:

    ordinary    made by the domain's grammar
    redundant   a near-copy of one of four master documents, half of them below a legal notice
    noise       an ordinary document with its words shuffled or its characters corrupted
"""

import random
from collections.abc import Callable, Iterator

NOTE = "synthetic text made by corpus/sample.py for tests and demonstrations; not SlimPajama"
KINDS = {"ordinary": 0.70, "redundant": 0.20, "noise": 0.10}  # shares in each domain and split
MASTERS = 4  # documents per domain that near-copies are made of


def words(text: str) -> list[str]:
    return text.split()


SYLLABLES = words(
    "ba bel bor ca chen da del dor el fa fen gor gran ha hol il ka kel la len lor ma mir mon na "
    "nor o pel ra ren ros sa sel sha tal tem tor u va vel vin wen yar zan"
)
FIRST = words(
    "Ada Bruno Clara Dov Elin Farid Greta Hugo Ines Jonas Karin Lev Mara Nils Olga Pavel Rosa Sven "
    "Yara"
)
ADJECTIVES = words(
    "old quiet narrow bright heavy distant pale sudden empty crooked gentle bitter golden cold "
    "silent patient broken weary restless hollow"
)
NOUNS = words(
    "door river lamp garden letter window horse winter bridge clock stranger kitchen shadow "
    "promise orchard staircase harbour mirror candle coat village storm sister road"
)
VERBS = words(
    "opened crossed carried remembered followed watched forgot lifted counted buried mended feared "
    "praised painted missed answered"
)
PRODUCTS = words(
    "kettle backpack mattress blender sofa drill stroller helmet camera vacuum tent printer heater "
    "bicycle monitor jacket"
)
TASKS = words(
    "clean store repair choose compare wash assemble adjust replace insure return measure paint "
    "charge"
)
TOPICS = words(
    "budget transport housing harvest energy water schools hospital election tourism fishing "
    "railway broadband recycling flood airport"
)
BODIES = words("council ministry union committee agency court parliament company university police")
CODE_NOUNS = words(
    "buffer index token record queue node cache value item batch graph path weight offset header "
    "frame chunk key count state"
)
CODE_VERBS = words(
    "load parse merge update split flush encode find count build check reset sort filter apply"
)
TOOLS = words(
    "kernel driver compiler terminal router database browser debugger container firewall scheduler "
    "plugin"
)
SYMBOLS = words(r"\alpha \beta \gamma \lambda \mu \sigma \phi \omega x y z f g u v")
SPACES = words(r"\mathbb{R}^n L^2(\Omega) H^1 C^k(M) \ell^p X Y V^*")
CLAIMS = words(
    "compact continuous bounded convex measurable separable complete reflexive smooth coercive "
    "monotone"
)
MONTHS = words("March May June October")
DAYS = words("Monday Tuesday Thursday Friday")
COSTS = words("overdue costly modest historic unfair")
QUALITIES = words("light sturdy affordable waterproof stylish")
COMPARISONS = words("== < > !=")
OPERATORS = words("+ - * %")
REMEDIES = ("You need to", "Try to", "As a workaround,")
DIRECTIONS = words("north south east west")
BUILDINGS = words("church mill castle chapel school station theatre")


# The grammars. The order of the random draws is part of the corpus: keep it.


def name(rng: random.Random, syllables: int = 2) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables)).capitalize()


def arxiv(rng: random.Random) -> str:
    """LaTeX: theorems and proofs over a few symbols that stay the same within a document."""
    a, b, c = rng.sample(SYMBOLS, 3)
    space = rng.choice(SPACES)
    claim = rng.choice(CLAIMS)
    author = name(rng)
    lines = [
        rf"\section{{On {claim} operators of {author} type}}",
        rf"Let ${a} \in {space}$ and let ${b}$ be {claim}.",
    ]
    for i in range(rng.randint(4, 9)):
        n = rng.randint(2, 9)
        p = rng.randint(1, 4)
        lines += [
            rf"\begin{{theorem}}\label{{thm:{i + 1}}}",
            rf"If ${b}$ is {rng.choice(CLAIMS)}, then "
            rf"$\| {a}_{{{n}}} \|_{{{space}}} \le {n} \| {b} \|^{{{p}}}$.",
            r"\end{theorem}",
            r"\begin{proof}",
            rf"By Theorem~\ref{{thm:{max(1, i)}}} and the inequality of {author},",
            r"\[",
            rf"  \int_\Omega |{a} - {b}_{{{n}}}|^{{{p}}} \, d{c} = "
            rf"\sum_{{k=1}}^{{{n}}} \frac{{{c}_k}}{{k^{{{p}}}}} \to 0 .",
            r"\]",
            rf"Hence ${a}$ is {rng.choice(CLAIMS)}.",
            r"\end{proof}",
        ]
    return "\n".join(lines)


def book(rng: random.Random) -> str:
    """Prose: long sentences and dialogue between two people."""
    people = rng.sample(FIRST, 2)
    paragraphs = []
    for _ in range(rng.randint(6, 14)):
        who, other = rng.sample(people, 2)
        scene = (
            f"{who} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}, "
            "and for a long while nobody spoke, "
            f"since the {rng.choice(NOUNS)} was {rng.choice(ADJECTIVES)} "
            f"and the {rng.choice(NOUNS)} still {rng.choice(ADJECTIVES)}."
        )
        speech = (
            f'"You {rng.choice(VERBS)} my {rng.choice(NOUNS)}," said {other}, '
            f'"as one who never {rng.choice(VERBS)} a '
            f'{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."'
        )
        paragraphs.append(f"{scene} {speech}" if rng.random() < 0.6 else scene)
    return "\n\n".join(paragraphs)


def cc(rng: random.Random) -> str:
    """A news page: navigation, byline, short paragraphs about one topic."""
    topic = rng.choice(TOPICS)
    body = rng.choice(BODIES)
    town = name(rng, 3)
    first_name = rng.choice(FIRST)
    last_name = name(rng)
    date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(2004, 2019)}"
    lines = [
        f"Home > News > {topic.title()} > {town}",
        f"{town} {body} votes on {topic} plan",
        f"By {first_name} {last_name} | {date}",
    ]
    for _ in range(rng.randint(5, 10)):
        percent = rng.randint(2, 90)
        cost = rng.randint(3, 400)
        lines.append(
            f"The {rng.choice(BODIES)} said on {rng.choice(DAYS)} that {rng.choice(TOPICS)} "
            f"spending in {town} had {rng.choice(('risen', 'fallen'))} by {percent} per cent, "
            f"to ${cost} million. {last_name} called the {topic} plan {rng.choice(COSTS)}."
        )
    lines.append(f"Share | Print | Comments ({rng.randint(0, 99)})")
    return "\n".join(lines)


def c4(rng: random.Random) -> str:
    """Advice in the second person about one product."""
    product = rng.choice(PRODUCTS)
    brand = name(rng)
    sentences = [f"{rng.randint(3, 12)} ways to {rng.choice(TASKS)} your {product}"]
    for _ in range(rng.randint(6, 12)):
        advice = (
            f"If you want to {rng.choice(TASKS)} your {product}, make sure that you "
            f"{rng.choice(TASKS)} it before you {rng.choice(TASKS)} the {rng.choice(PRODUCTS)}!"
        )
        praise = (
            f"Our {brand} {product} is {rng.choice(QUALITIES)}, so you can {rng.choice(TASKS)} "
            f"it in {rng.randint(2, 59)} minutes."
        )
        offer = (
            f"Don't forget: a {product} from {brand} ships free, and you will love how easy it is "
            f"to {rng.choice(TASKS)}."
        )
        sentences.append(rng.choice((advice, praise, offer)))
    return " ".join(sentences)


def github(rng: random.Random) -> str:
    """Python-like code: functions whose names, arguments and bodies agree."""
    lines = [f"import {rng.choice(CODE_NOUNS)}s", ""]
    for _ in range(rng.randint(4, 9)):
        verb = rng.choice(CODE_VERBS)
        a, b, c = rng.sample(CODE_NOUNS, 3)
        lines += [
            f"def {verb}_{a}({a}, {b}=None, n={rng.randint(0, 64)}):",
            f'    """{verb.capitalize()} the {a}."""',
            f"    {c} = []",
            f"    for i in range(len({a})):",
            f"        if {a}[i] {rng.choice(COMPARISONS)} n and {b} is not None:",
            f"            {c}.append({a}[i] {rng.choice(OPERATORS)} {rng.randint(1, 9)})",
        ]
        if rng.random() < 0.7:
            lines.append(f"    return {c}")
        else:
            lines.append(f"    assert {c}, '{c} is empty'")
            lines.append(f"    return self.{rng.choice(CODE_VERBS)}_{c}({c}, n)")
        lines.append("")
    return "\n".join(lines)


def stackexchange(rng: random.Random) -> str:
    """A question about a tool and its answers."""
    tool = rng.choice(TOOLS)
    other = rng.choice(TOOLS)
    code = f"E{rng.randint(100, 999)}"
    posts = [
        f"Q: {tool.capitalize()} fails with {code} after updating the {other}\n\n"
        f"I am using {tool} {rng.randint(1, 9)}.{rng.randint(0, 20)} and get {code} whenever I "
        f"start the {other}. What am I doing wrong? I already tried to restart the "
        f"{rng.choice(TOOLS)}."
    ]
    for _ in range(rng.randint(3, 7)):
        posts.append(
            f"A: {rng.choice(REMEDIES)} disable the {rng.choice(TOOLS)} and run "
            f"`{tool} --{rng.choice(CODE_VERBS)}-{other} {rng.randint(1, 64)}`. {code} means that "
            f"the {other} cannot reach the {rng.choice(TOOLS)}; see the {tool} manual, "
            f"page {rng.randint(1, 12)}."
        )
    return "\n\n".join(posts)


def wikipedia(rng: random.Random) -> str:
    """An entry about a town, its figures repeated across sections."""
    town = name(rng, 3)
    region = name(rng)
    river = name(rng)
    year = rng.randint(900, 1890)
    people = rng.randint(800, 90_000)
    lines = [
        f"{town} is a town in the {rng.choice(DIRECTIONS)} of {region}. In "
        f"{rng.randint(1990, 2018)} it had a population of {people:,}. It lies on the river "
        f"{river}.",
        "History",
        f"{town} was first mentioned in {year}. It received market rights in "
        f"{year + rng.randint(20, 120)}.",
    ]
    for _ in range(rng.randint(4, 8)):
        century = rng.randint(11, 20)
        lines.append(
            f"In the {century}th century the {rng.choice(BODIES)} of {region} built a "
            f"{rng.choice(BUILDINGS)} in {town}, designed by {rng.choice(FIRST)} {name(rng)} "
            f"(born {century * 100 - rng.randint(20, 99)})."
        )
    lines.append("Geography")
    lines.append(
        f"The {river} flows through {town} for {rng.randint(2, 40)} km before it leaves {region}."
    )
    return "\n".join(lines)


GRAMMARS: dict[str, Callable[[random.Random], str]] = {
    "RedPajamaArXiv": arxiv,
    "RedPajamaBook": book,
    "RedPajamaCommonCrawl": cc,
    "RedPajamaC4": c4,
    "RedPajamaGithub": github,
    "RedPajamaStackExchange": stackexchange,
    "RedPajamaWikipedia": wikipedia,
}


def redundant(seed: int, domain: str, rng: random.Random) -> str:
    """A near-copy of one of the domain's masters: three words in a hundred are changed."""
    master_seed = f"{seed}/{domain}/master {rng.randrange(MASTERS)}"
    master = GRAMMARS[domain](random.Random(master_seed))
    parts = master.split(" ")
    n_changed = max(1, len(parts) * 3 // 100)
    for i in rng.sample(range(len(parts)), n_changed):
        parts[i] = rng.choice(NOUNS)
    notice = (
        f"{domain} notice. This copy is provided as is, without warranty of any kind. All rights "
        "reserved. By using it you agree to the terms of use and to the storage of cookies on your "
        "device.\n"
    )
    return notice * rng.randrange(2) + " ".join(parts)


def noise(domain: str, rng: random.Random) -> str:
    """An ordinary document with its words shuffled, or a third of its characters replaced."""
    text = GRAMMARS[domain](rng)
    if rng.random() < 0.5:
        parts = text.split()
        return " ".join(rng.sample(parts, len(parts)))
    letters = [chr(rng.randrange(33, 127)) if rng.random() < 1 / 3 else c for c in text]
    return "".join(letters)


def documents(seed: int = 0, documents_per_domain: int = 600) -> Iterator[tuple[str, dict]]:
    """(split, record) pairs, the domains in turn; every tenth document is for validation."""
    n_validation = documents_per_domain // 10
    sizes = {"validation": n_validation, "train": documents_per_domain - n_validation}
    kinds = {}
    for domain in GRAMMARS:
        for split, n in sizes.items():
            order = random.Random(f"{seed}/{domain}/{split}")
            kinds[domain, split] = iter(shuffled_kinds(n, order))
    for i in range(documents_per_domain):
        split = "validation" if i % 10 == 9 else "train"
        for domain in GRAMMARS:
            kind = next(kinds[domain, split])
            rng = random.Random(f"{seed}/{domain}/{i}")
            if kind == "redundant":
                text = redundant(seed, domain, rng)
            elif kind == "noise":
                text = noise(domain, rng)
            else:
                text = GRAMMARS[domain](rng)
            yield split, {"text": text, "meta": {"redpajama_set_name": domain, "kind": kind}}


def shuffled_kinds(n: int, rng: random.Random) -> list[str]:
    """The kinds of n documents in random order, in the exact shares of KINDS."""
    n_redundant = round(KINDS["redundant"] * n)
    n_noise = round(KINDS["noise"] * n)
    kinds = ["redundant"] * n_redundant + ["noise"] * n_noise
    kinds += ["ordinary"] * (n - len(kinds))
    return rng.sample(kinds, n)
