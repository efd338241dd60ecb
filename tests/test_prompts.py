"""Prompts come out of every kind of file as they went in, and out of large files as a sample."""

import csv
import gzip
import json
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import TINY_TEACHER
from train_distillation import Settings
from wanlite.data.grammar import varied_prompts
from wanlite.data.prompts import read_prompts, sample_prompts, stream_prompts
from wanlite.planning.defaults import choose_prompts
from wanlite.planning.resolve import REAL_TEACHERS, complete

PROMPTS = ['a "quoted", comma\'d prompt', "zweite Zeile: Käse", "a third {one}"]


def write(path, prompts, column="prompt"):
    """Write prompts as the kind of file that the name says, beside another column."""
    rows = [{"id": number, column: prompt} for number, prompt in enumerate(prompts)]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["id", column], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(prompts), encoding="utf-8")
    return path


@pytest.mark.parametrize("column", ["prompt", "text", "Caption"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_prompts_are_read_as_they_were_written(kind, column, tmp_path):
    assert read_prompts(write(tmp_path / f"prompts{kind}", PROMPTS, column)) == PROMPTS


@pytest.mark.parametrize("kind, rows", [(".jsonl", "2, 3"), (".csv", "3, 4"), (".parquet", "2, 3")])
def test_rows_without_a_prompt_are_left_out_and_named(kind, rows, tmp_path):
    said = []
    assert read_prompts(write(tmp_path / f"prompts{kind}", ["one", "", "  ", "two"]), said.append) == [
        "one",
        "two",
    ]
    assert len(said) == 1 and said[0].endswith(f"2 of 4 rows hold no prompt and are left out: {rows}")


def test_a_line_ends_where_a_line_ends_and_not_at_every_separator_of_unicode(tmp_path):
    prompts = ["one\u2028line", "another\x85one", "a \x0b third"]
    (tmp_path / "a.jsonl").write_bytes(
        "\r\n".join(json.dumps({"text": each}, ensure_ascii=False) for each in prompts).encode()
    )
    assert read_prompts(tmp_path / "a.jsonl") == prompts
    (tmp_path / "a.txt").write_bytes("\r".join(prompts).encode())
    assert read_prompts(tmp_path / "a.txt") == prompts


def test_json_lines_may_be_strings_and_be_called_json(tmp_path):
    (tmp_path / "prompts.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_prompts(tmp_path / "prompts.json") == ["one", "two"]
    (tmp_path / "prompts.jsonl").write_text('"one"\n\n"two"\n')
    assert read_prompts(tmp_path / "prompts.jsonl") == ["one", "two"]


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("a.csv", "prompt\na ring, at the left, on white\n", ["a ring, at the left, on white"]),
        (
            "a.csv",
            'prompt\r\n"one, quoted"\r\na sign, "OPEN", in fog\r\n',
            ["one, quoted", 'a sign, "OPEN", in fog'],
        ),
        ("a.csv", 'prompt,,\na, b\n"a, b",,\nc,,\n', ["a, b", "a, b", "c"]),
        ("a.csv", "id,prompt,\n1,a ring,\n", ["a ring"]),
        ("a.csv", "prompt\ra, b\rc", ["a, b", "c"]),
    ],
)
def test_a_table_of_one_column_needs_no_quotes_around_commas(name, content, prompts, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "a.csv",
            "id,prompt\n1,one\n2,a ring, on white\n",
            "row 3 has 3 cells, the header 2: quote prompts with commas",
        ),
        ("a.csv", 'prompt\n"a ring, at the left", on white\n', "row 2 has 2 cells, the header 1: quote"),
        ("a.csv", '"prompt"\n"1","a ring"\n', "row 2 has 2 cells, the header 1"),
        ("a.csv", "prompt,score\n\na ring, at the left,0.9\n", "row 3 has 3 cells, the header 2"),
        (
            "a.csv",
            "id;prompt\n1;a ring; red\n",
            "row 2 has 3 cells, the header 2: quote prompts with semicolons",
        ),
        (
            "a.tsv",
            "id\tprompt\n1\ta ring\ton white\n",
            "row 2 has 3 cells, the header 2: quote prompts with tabs",
        ),
        ("a.tsv", "prompt\na ring\t0.9\n", "row 2 has 2 cells, the header 1"),
        ("a.csv", 'prompt\none\n"OPEN" on a sign, in fog\n', "cannot be read as CSV .line 3: "),
        ("a.csv", "prompt,id,Prompt\none,1,two\n", "has 2 columns called prompt, expected one"),
    ],
)
def test_a_table_whose_cells_do_not_fit_its_header_is_refused_by_row(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_table_is_read_by_the_separator_of_its_header(separator, suffix, tmp_path):
    rows = [["id", "prompt"], ["1", "a ring; red, on white | black"], ["2", 'a "sign"\tand\na line']]
    with open(tmp_path / f"a{suffix}", "w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    assert read_prompts(tmp_path / f"a{suffix}") == [prompt for _, prompt in rows[1:]]


def texts(*cells):
    """Bytes as a column of text, which pyarrow does not check."""
    buffers = [np.cumsum([0, *map(len, cells)], dtype=np.int32), b"".join(cells)]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(cells), [None, *map(pyarrow.py_buffer, buffers)])


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", rb'{"prompt": "one"}' b"\n" rb'{"prompt": "\ud800 cat"}'),
        ("a.json", rb'["one", "a cat \udfff"]'),
        ("a.jsonl", b'"one"\n' rb'"\ude00\ud83d"'),
        ("a.parquet", texts(b"one", b"a \xff cat")),
        ("a.parquet", texts(b"one", b"\xed\xa0\x80").dictionary_encode()),
    ],
)
def test_a_prompt_that_utf8_cannot_encode_is_refused_by_file_and_row(name, content, tmp_path):
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"prompt": content}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{name}: row 2 holds '\\ud\w+', not a character that UTF-8 can encode"
    ):
        read_prompts(tmp_path / name)


def test_text_that_is_not_utf8_is_refused_by_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xed\xa0\x80")
    with pytest.raises(ValueError, match=r"a.txt: not UTF-8 text .byte 8, in line 2."):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "\U0001f600 cat"})
    )  # written as two halves: one character
    assert read_prompts(tmp_path / "a.jsonl") == ["\U0001f600 cat"]


def test_a_table_with_two_columns_of_prompts_is_refused(tmp_path):
    twice = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"]
    )
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: has 2 columns called prompt, expected one"):
        read_prompts(tmp_path / "a.parquet")


def test_a_damaged_page_of_a_table_is_named(tmp_path):
    write(path := tmp_path / "a.parquet", PROMPTS)
    content = bytearray(path.read_bytes())
    start = content.index(b"quoted")
    content[start - 24 : start] = b"\xff" * 24  # the head of the page that holds the prompts
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet: cannot be read as parquet"):
        read_prompts(path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": "one", "prompt": "two"}', "line 1 has a duplicate key prompt"),
        ("a.json", b'[{"prompt": "one", "prompt": "two"}]', "row 1 has a duplicate key prompt"),
        ("a.jsonl", b'{"url": "x"}', "columns url, expected"),
        ("a.csv", b"id,url\n1,x\n", "columns id, url, expected"),
        ("a.csv", b"", "has the columns none, expected"),
        ("a.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        (
            "a.json",
            b'{"prompt": \n"one"}',
            "line 1 is not JSON. Expected an object or a string per line, or a list of them",
        ),
        ("a.json", b"[" * 10**5, "nested too deep"),
        ("a.csv", b'prompt\none\n"two\nthree\n', "cannot be read as CSV"),
        ("a.tsv", b"id\turl\n1\tx\n", "columns id, url, expected"),
        ("a.txt.gz", gzip.compress(b"one", mtime=0), "is compressed"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "holds zero bytes: it is UTF-16"),
        ("a.txt", b"<!DOCTYPE html><p>one</p>", "is a web page"),
        ("a.jsonl", b'{"prompt": ""}\n', "holds no prompt"),
        ("a.txt", b" \n\n", "holds no prompt"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_with_what_was_expected(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / name)


MANY = [
    f"prompt {number} of {'x' * (1 + number % 50)}" for number in range(30_000)
]  # more than a block of JSON


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_large_file_is_sampled_the_same_in_every_format_and_order(kind, tmp_path):
    path = write(tmp_path / f"many{kind}", MANY[::-1])
    assert read_prompts(path, count=100, seed=3) == sample_prompts(MANY, 100, 3)
    assert len(read_prompts(path)) == len(MANY)


def test_a_larger_sample_begins_with_a_smaller_one_and_holds_no_prompt_twice():
    sample = sample_prompts(MANY * 2, 500, 0)
    assert len(set(sample)) == 500 and set(sample) < set(MANY)
    assert sample_prompts(MANY, 60, 0) == sample[:60]
    assert len({*sample_prompts(MANY, 500, 1)} & {*sample}) < 40


def test_a_sample_of_no_more_prompts_than_there_are_keeps_their_order():
    assert (
        sample_prompts(["b", "a", "b", "c"], 3, 0)
        == sample_prompts(["b", "a", "b", "c"], 9, 0)
        == ["b", "a", "c"]
    )


def test_a_sample_is_pinned_for_every_platform():
    assert sample_prompts(["one", "two", "drei", "\u56db", "cinq"], 3, 7) == ["two", "cinq", "\u56db"]


def test_every_prompt_has_the_same_chance_to_be_sampled():
    counts = Counter(prompt for seed in range(2000) for prompt in sample_prompts("abcdefgh", 2, seed))
    assert set(counts) == set("abcdefgh") and all(420 < number < 580 for number in counts.values())


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_a_sample_holds_a_small_part_of_a_file(kind, tmp_path):
    path = write(tmp_path / f"many{kind}", [f"{prompt} {'y' * 1000}" for prompt in MANY[:10_000]])  # 10 MB
    read_prompts(path, count=10)
    tracemalloc.start()
    try:
        read_prompts(path, count=10)
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()


def test_a_fault_behind_the_first_block_is_found(tmp_path):
    (tmp_path / "a.txt").write_bytes("\n".join(MANY).encode() + b"\n\xff")
    with pytest.raises(ValueError, match=f"not UTF-8 text .byte .*, in line {len(MANY) + 1}"):
        read_prompts(tmp_path / "a.txt", count=5)
    (tmp_path / "a.json").write_text(json.dumps(MANY)[:-1] + ", {]")
    with pytest.raises(ValueError, match=f"row {len(MANY) + 1} is not JSON"):
        read_prompts(tmp_path / "a.json", count=5)
    (tmp_path / "a.csv").write_text("id,prompt\n" + "1,one\n" * 30_000 + "2,a ring, on white\n")
    with pytest.raises(ValueError, match="row 30002 has 3 cells, the header 2"):
        read_prompts(tmp_path / "a.csv", count=5)


@pytest.mark.parametrize(
    "content, prompts",
    [
        ('["one" , {"text" : "two"}\n]\n', ["one", "two"]),
        ('\n [ "one","]" ]', ["one", "]"]),
        ('[12, "one", null, ["two"]]', ["one"]),
    ],
)
def test_a_json_list_may_have_any_blanks_and_items(content, prompts, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert read_prompts(tmp_path / "a.json") == prompts


@pytest.mark.parametrize("content", ['["one" "two"]', '["one"] 2', '["one",]', "[", '["one"', '["one", tru]'])
def test_a_broken_json_list_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json: .* is not JSON. Expected .*, or a list of them"):
        read_prompts(tmp_path / "a.json")


def test_prompts_come_before_the_file_is_read_to_its_end(tmp_path):
    prompts = stream_prompts(write(tmp_path / "a.jsonl", ["one", "two"]))
    (tmp_path / "b.jsonl").write_text('"one"\n{')
    assert next(prompts) == "one" == next(stream_prompts(tmp_path / "b.jsonl"))


def test_a_run_with_fewer_trajectories_than_prompts_trains_on_a_sample(tmp_path):
    path = write(tmp_path / "many.txt", MANY)
    settings = Settings(prompts=str(path), num_trajectories=1000, num_held_out=50)
    training, held_out = choose_prompts(settings)
    assert training + held_out == sample_prompts(MANY, 1050, settings.seed) and len(held_out) == 50
    training, held_out = choose_prompts(Settings(prompts=str(path), num_held_out=50))
    assert training + held_out == MANY


def test_a_run_of_any_size_has_as_many_prompts_of_the_grammar_as_trajectories(tmp_path):
    for count in (30, 300):
        settings = Settings(teacher=str(tmp_path), num_trajectories=count)
        training, held_out = choose_prompts(settings)
        assert training == varied_prompts(settings.seed, count) and len(held_out) == max(1, count // 20)
        assert not set(training) & set(held_out)


def test_a_real_teacher_in_this_folder_is_found_and_learns_from_the_grammar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complete(Settings()).teacher == str(TINY_TEACHER)
    for part in ("tokenizer", "text_encoder", "vae"):
        (tmp_path / REAL_TEACHERS[0] / part).mkdir(parents=True)
    for place in ("", "vae"):  # of one network, whose config lies in the official folder itself
        (tmp_path / REAL_TEACHERS[0] / place / "config.json").write_text("{}")
    settings = complete(Settings())
    assert settings.teacher == str(tmp_path / REAL_TEACHERS[0]) and settings.resolution == 512
    (tmp_path / REAL_TEACHERS[0] / "high_noise_model").mkdir()
    assert settings.flow_shift == complete(Settings()).flow_shift == 3.0  # of one expert and of two
    training, held_out = choose_prompts(settings)
    assert len(set(training)) == 4000 and training[:100] == varied_prompts(settings.seed, 100)
    assert held_out == varied_prompts(settings.seed, 200, held_out=True)
