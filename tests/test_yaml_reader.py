"""What a YAML file means and where each value stands; traps and attacks."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ProfileError
from compress.yaml_reader import MAX_BYTES, MAX_DEPTH, Document, dotted, plain_scalar, read_yaml, read_yaml_file


def value_of(text):
    document = read_yaml(text, "f.yaml")
    assert document.problems == []
    return document.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", "2:4"),  # YAML 1.1: the base-60 number 124
        ("1e-5", 1e-5),  # PyYAML: a string, for want of a dot
        ("no", "no"),  # YAML 1.1: false
        ("on", "on"),
        ("1.10", 1.1),
        ("0123", 123),  # YAML 1.1: octal
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),  # YAML 1.1: 1000
        ("2001-01-01", "2001-01-01"),  # YAML 1.1: a date
        ("-.5", -0.5),
        ("5.", 5.0),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("tRUE", "tRUE"),
        ("null", None),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        ("=", "="),  # YAML 1.1 has a tag for this one
        ("<<", "<<"),
        (".", "."),
        ("-", [None]),
    ],
)
def test_core_schema(text, expected):
    value = value_of(f"key: {text}\n" if text != "-" else "key:\n  -\n")["key"]
    assert value == expected
    assert type(value) is type(expected)


def test_nan():
    assert math.isnan(value_of("[.nan]")[0])


def test_block_scalars_anchors_and_comments():
    text = "a: &x {b: 1}  # one\nc: *x\nd: |\n  two\n  lines\ne: >\n  folded\n  text\n"
    assert value_of(text) == {"a": {"b": 1}, "c": {"b": 1}, "d": "two\nlines\n", "e": "folded text\n"}


def test_aliases_give_copies():
    value = value_of("a: &x {b: 1}\nc: *x\n")
    value["a"]["b"] = 2
    assert value["c"] == {"b": 1}


def test_every_value_has_its_line():
    document = read_yaml("a: 1\nb:\n  - x\n  - c.d:\n      e: 1.10\n", "f.yaml")
    places = {dotted(path): place.origin for path, place in document.places.items()}
    assert places == {"": "f.yaml:1", "a": "f.yaml:1", "b": "f.yaml:2", "b[0]": "f.yaml:3", "b[1]": "f.yaml:4",
                      "b[1].c.d": "f.yaml:4", "b[1].c.d.e": "f.yaml:5"}  # fmt: skip
    assert document.places[("b", 1, "c.d", "e")].raw == "1.10"
    assert document.place(("b", 7, "z")).origin == "f.yaml:2"  # what is not there stands where it belongs
    assert Document("g.yaml").place(("a",)).origin == "g.yaml"


def test_duplicate_keys_name_both_lines():
    document = read_yaml("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 4\n", "f.yaml")
    assert [str(problem) for problem in document.problems] == [
        "f.yaml:5: b.c: the key is given twice, first on line 3",
        "f.yaml:6: a: the key is given twice, first on line 1",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: !!python/object/apply:os.system [id]", r"f.yaml:1: a: got the tag !!python/object/apply:os.system"),
        ("a: !Foo {}", "f.yaml:1: a: got the tag !Foo; expected plain YAML without tags"),
        ("a: !!str 1", "f.yaml:1: a: got the tag !!str"),
        ("x: 1\n1: a", 'f.yaml:2: got the key 1, which is no string; expected a name as key. Quote it: "1".'),
        ("true: a", "f.yaml:1: got the key true, which is no string"),
        ("x: {y: {? [a] : b}}", "f.yaml:1: x.y: got a list or mapping as a key"),
        ("a: &a [*a]", r"f.yaml:1: a\[0\]: got an alias to something that contains it"),
        ("a: " + "9" * 5000, "f.yaml:1: a: got a number of 5000 digits"),
    ],
)
def test_listed_problems(text, problem):
    found = read_yaml(text, "f.yaml").problems
    assert len(found) == 1
    with pytest.raises(ProfileError, match=problem):
        raise ProfileError(found[0].where, found[0].got, found[0].allowed, found[0].do)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "f.yaml:1: not YAML"),
        ("a:\n\t- b", "f.yaml:2: not YAML.*Indent with spaces, not tabs"),
        ("a: b: c", "f.yaml:1: not YAML.*Quote a text that holds a colon and a space"),
        ("a: 1\n---\nb: 2", "f.yaml:2: not YAML: expected a single document"),
        ("a: 1\nb: *c", "f.yaml:2: not YAML: found undefined alias"),
        ("a: 1\nb: \x00", r"f.yaml:2: a character that YAML does not allow \(U\+0000\)"),
        ("[" * 3000, f"f.yaml:1: not YAML: nested deeper than {MAX_DEPTH} levels"),
        ("- " * 3000, f"f.yaml:1: not YAML: nested deeper than {MAX_DEPTH} levels"),
        ("#" * (MAX_BYTES + 1), "f.yaml: too large; expected at most 256 KiB"),
    ],
)
def test_what_is_no_yaml(text, message):
    with pytest.raises(ProfileError, match=message):
        read_yaml(text, "f.yaml")


def test_billion_laughs():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ProfileError, match="more than 20000 values after its aliases are followed"):
        read_yaml("\n".join(lines), "f.yaml")


def test_files(tmp_path):
    good, latin, missing = tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "c.yaml"
    good.write_bytes(b"\xef\xbb\xbfname: caf\xc3\xa9\n")
    latin.write_bytes(b"a: 1\nname: caf\xe9\n")
    assert read_yaml_file(good).value == {"name": "café"}
    with pytest.raises(ProfileError, match=r"b\.yaml:2: the byte 0xe9 is not UTF-8"):
        read_yaml_file(latin)
    with pytest.raises(ProfileError, match=r"c\.yaml: No such file"):
        read_yaml_file(missing)
    with pytest.raises(ProfileError, match="Is a directory"):
        read_yaml_file(tmp_path)


TEXT = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_json_is_yaml(value):
    document = read_yaml(json.dumps(value, ensure_ascii=False), "f.yaml")
    assert document.problems == []
    assert document.value == value


@given(st.integers(min_value=-(10**90), max_value=10**90))
def test_integers_read_back(number):
    assert plain_scalar(str(number)) == number


@given(st.floats(allow_nan=False))
def test_floats_read_back(number):
    assert plain_scalar(repr(number) if math.isfinite(number) else ("-.inf" if number < 0 else ".inf")) == number
