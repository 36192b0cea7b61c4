"""What an import may name, and that no secret of it is shown."""

import os

import pytest

from tfslurm.datasets.sources import Source
from tfslurm.errors import InvalidError

SIGNED = "https://u:pass%20word@h.example:8443/a/b.jsonl?X-Amz-Signature=0123abcdef&X-Amz-Expires=1#part"


@pytest.mark.parametrize(
    ("given", "scheme", "shown"),
    [
        ("/a/b.jsonl", "", "/a/b.jsonl"),
        ("/a/*.jsonl", "", "/a/*.jsonl"),
        ("file:///a/b%20c.jsonl", "", "/a/b c.jsonl"),
        ("a.jsonl", "", f"{os.getcwd()}/a.jsonl"),
        ("-", "-", "-"),
        ("s3://b/train-?.jsonl", "s3", "s3://b/train-?.jsonl"),
        ("s3://b/a.jsonl?versionId=12345678", "s3", "s3://b/a.jsonl"),
        ("S3://b/a#b.jsonl", "s3", "S3://b/a#b.jsonl"),
        ("gs://b/deep/", "gs", "gs://b/deep/"),
        ("hf://datasets/o/n@main/data/*.jsonl", "hf", "hf://datasets/o/n@main/data/*.jsonl"),
        (SIGNED, "https", "https://h.example:8443/a/b.jsonl"),
        ("HTTPS://u:p@h/a.jsonl?x=y", "https", "HTTPS://h/a.jsonl"),
    ],
)
def test_a_source_is_known_by_its_scheme_and_shown_without_secrets(given, scheme, shown):
    source = Source.parse(given)
    assert (source.scheme, source.shown) == (scheme, shown)
    assert given == shown or scheme in ("", "-") or source.secret


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ftp://h/a.jsonl", "ftp:// cannot be imported"),
        ("https://h/", "names no file"),
        ("https://h", "names no file"),
        ("https:///a.jsonl", "names no host"),
        ("https://h/a b.jsonl", "no blanks"),
        ("https://h:port/a.jsonl", "is no URL"),
        ("https://[::1/a.jsonl", "is no URL"),
        ("s3://", "names no host or bucket"),
        ("s3://key:hidden@bucket/a.jsonl", "credentials do not belong"),
        ("hf://o/n/a.jsonl", "is no dataset"),
        ("ftp://u:hidden@h/a.jsonl?sig=hidden", "cannot be imported"),
    ],
)
def test_what_cannot_be_imported_is_refused_without_its_secrets(given, words):
    with pytest.raises(InvalidError, match=words) as raised:
        Source.parse(given)
    assert "hidden" not in str(raised.value)


def test_no_secret_survives_scrubbing_and_none_is_in_the_representation():
    source = Source.parse(SIGNED)
    text = (
        f"{SIGNED} 0123abcdef pass%20word 'pass word' GET /a/b.jsonl?X-Amz-Signature=0123abcdef https://cdn/x?sig=else"
    )
    for said in (source.scrub(text), repr(source), source.shown):
        for secret in ("0123abcdef", "pass%20word", "pass word", "else"):
            assert secret not in said
    assert source.scrub("attempt 1 of 1") == "attempt 1 of 1"
    assert Source.parse("/a/b").scrub("/a/b?") == "/a/b?"
