"""The synthetic corpus: deterministic, labelled in known shares, with domains that differ."""

import hashlib
import json
import math
from collections import Counter, defaultdict

import pytest

from corpus import sample as sample_corpus
from corpus.manifest import SET_NAMES


@pytest.fixture(scope="module")
def records():
    return list(sample_corpus.documents())


def entropy(text: str) -> float:
    counts = Counter(text.encode())
    return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())


def test_is_the_same_everywhere(records):
    assert hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16] == "4cd0154c0c800603"
    assert list(sample_corpus.documents(seed=1, documents_per_domain=10)) != records[:70]


def test_schema_and_size(records):
    assert all(
        isinstance(r["text"], str) and r["meta"]["redpajama_set_name"] in SET_NAMES
        for _, r in records
    )
    assert 3e6 < sum(len(r["text"].encode()) for _, r in records) < 8e6
    assert {r["meta"]["redpajama_set_name"] for _, r in records[:7]} == set(SET_NAMES)


def test_kinds_come_in_their_shares(records):
    count = Counter(
        (r["meta"]["redpajama_set_name"], split, r["meta"]["kind"]) for split, r in records
    )
    for domain in SET_NAMES:
        for split, n in (("train", 540), ("validation", 60)):
            assert {
                kind: count[domain, split, kind] / n for kind in sample_corpus.KINDS
            } == sample_corpus.KINDS


def test_redundant_documents_repeat_and_noise_does_not_read(records):
    texts = defaultdict(list)
    for _, r in records:
        if r["meta"]["redpajama_set_name"] == "RedPajamaWikipedia":
            texts[r["meta"]["kind"]].append(r["text"])

    def repeated(
        kind,
    ):  # share of a document's word triples that stand in another document of the kind
        triples = [
            {tuple(w[i : i + 3]) for i in range(len(w) - 2)}
            for w in (t.split() for t in texts[kind][:40])
        ]
        return sum(max(len(a & b) for b in triples if b is not a) / len(a) for a in triples) / len(
            triples
        )

    assert repeated("redundant") > 0.8 > 0.5 > repeated("ordinary") > repeated("noise")


def test_domains_differ(records):
    text = defaultdict(str)
    for _, r in records[:2100]:
        if r["meta"]["kind"] == "ordinary":
            text[r["meta"]["redpajama_set_name"]] += r["text"]
    vocabularies = {d: {w for w, n in Counter(t.split()).items() if n > 5} for d, t in text.items()}
    for a in vocabularies:
        assert 2.5 < entropy(text[a]) < 4.0
        for b in vocabularies:
            if a < b:
                assert len(vocabularies[a] & vocabularies[b]) < 0.35 * min(
                    len(vocabularies[a]), len(vocabularies[b])
                )
