"""The grammar: its prompts are distinct, reproducible, of all lengths and in English, and keep the held-out rule."""

import json
import re
from collections import Counter

import pytest

from tests.conftest import run_script
from wanlite.data.grammar import compose, is_held_out, varied_prompts
from wanlite.data.grammar.choices import Choices
from wanlite.data.grammar.composition import LENGTHS, SLOTS
from wanlite.data.grammar.contradictions import contradicts_itself
from wanlite.data.grammar.english import american, capitalise, fix_articles, plural, words_of
from wanlite.data.grammar.held_out import held_out_with, lexicon
from wanlite.data.grammar.templates import expand, parse, slots
from wanlite.data.grammar.vocabulary import read_vocabulary

COUNT = 3000  # a second


@pytest.fixture(scope="module")
def prompts():
    return varied_prompts(0, COUNT)


@pytest.fixture(scope="module")
def held_out():
    return varied_prompts(0, 300, held_out=True)


# ---- which prompts ----------------------------------------------------------------------------------------


def test_prompts_are_distinct(prompts):
    assert len(set(prompts)) == len(prompts) == COUNT


def test_a_longer_list_begins_with_a_shorter_one(prompts):
    assert varied_prompts(0, 500) == prompts[:500]
    assert varied_prompts(0, 1) == prompts[:1]


def test_composing_shows_plain_lines_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr("wanlite.runtime.progress.SECONDS", 0)
    varied_prompts(0, 3)
    printed = capsys.readouterr().err
    assert "composing prompts 1/3, " in printed and printed.count("\n") == 3 and "\r" not in printed


def test_a_prompt_is_a_function_of_seed_and_index_alone():
    forward = [compose(5, index) for index in range(200)]
    assert [compose(5, index) for index in reversed(range(200))] == forward[::-1]
    assert sum(compose(6, index) == prompt for index, prompt in enumerate(forward)) < 10


def test_another_process_composes_the_same_prompts():
    code = "from wanlite.data.grammar import varied_prompts as p; print(ascii(p(2, 200) + p(2, 20, True)))"
    process = run_script("-c", code)
    assert process.stdout.strip() == ascii(varied_prompts(2, 200) + varied_prompts(2, 20, held_out=True))


def test_choices_are_even_and_never_end():
    choices = Choices(1, 2)
    found = Counter(choices.below(7) for _ in range(7000))
    assert set(found) == set(range(7)) and all(850 < number < 1150 for number in found.values())
    assert Choices(1, 2).below(2**32) == Choices(1, 2).below(2**32) != Choices(12).below(2**32)


# ---- the held-out rule ------------------------------------------------------------------------------------


def held_out_pairs(prompt):
    """Return the held-out pairs of a subject and a place that a prompt names, found another way."""
    (subjects, places), words = lexicon(), words_of(prompt)
    return [
        (subject, place)
        for subject in words
        for place in words
        if place in places and subjects.get(subject) in held_out_with(places[place])
    ]


def test_held_out_pairs_never_meet_in_training_prompts(prompts):
    assert not any(map(held_out_pairs, prompts))
    assert not any(map(held_out_pairs, (compose(9, index) for index in range(50_000, 50_300))))


def test_every_held_out_prompt_names_a_held_out_pair(held_out, prompts):
    assert all(map(held_out_pairs, held_out)) and not set(held_out) & set(prompts)


def test_a_held_out_pair_is_recognised_in_singular_plural_and_both_spellings():
    assert is_held_out("a harbor") is is_held_out("a lighthouse") is False
    place = next(place for place in sorted(set(lexicon()[1].values())) if held_out_with(place))
    subject = sorted(held_out_with(place))[0]
    for form in (subject, plural(subject), american(subject), subject.upper()):
        assert is_held_out(f"two {form} and a {place}")


def test_one_pair_in_sixty_is_held_out():
    subjects, places = (set(forms.values()) for forms in lexicon())
    held = sum(len(held_out_with(place)) for place in places)
    assert held / len(subjects) / len(places) == pytest.approx(1 / 60, rel=0.05)


# ---- variety ----------------------------------------------------------------------------------------------


def test_prompts_have_one_word_to_more_than_eighty(prompts):
    lengths = [len(prompt.split()) for prompt in prompts]
    for fewest, most, share in ((1, 5, 0.06), (6, 12, 0.18), (13, 25, 0.25), (26, 50, 0.18), (51, 120, 0.09)):
        assert sum(fewest <= length <= most for length in lengths) > share * COUNT
    assert min(lengths) == 1 and 80 < max(lengths) < 130


def test_prompts_use_thousands_of_words_and_hundreds_of_letterings(prompts):
    assert len({word for prompt in prompts for word in words_of(prompt)}) > 4000
    assert len({text for prompt in prompts for text in re.findall(r'"([^"]+)"', prompt)}) > 150


def test_no_scene_and_no_beginning_dominates(prompts):
    beginnings = Counter(tuple(prompt.lower().split()[:3]) for prompt in prompts)
    assert max(beginnings.values()) < 0.05 * COUNT


def test_every_list_is_there_and_every_list_is_used():
    for scene in read_vocabulary().scenes:
        medium = set.intersection(*(set(lists) for lists in read_vocabulary().media))
        for cast in scene.casts or [None]:
            lists = scene.lists | (cast.lists if cast else {})
            reached: set[str] = set()
            coming = [template for form in scene.forms.values() for template in form]
            while coming:
                for name in slots(coming.pop()) - reached:
                    reached.add(name)
                    name = name.removeprefix("quoted ").removesuffix("+s")
                    if name in SLOTS or name in medium:
                        continue
                    assert name in lists, f"{scene.name}: {name}"
                    coming += lists[name]
            assert not cast or {"place", "detail", "sentence"} <= reached
        assert scene.forms.keys() <= set(LENGTHS)


def test_no_list_holds_an_entry_twice():
    for scene in read_vocabulary().scenes:
        for cast in scene.casts:
            repeated = [noun for noun, number in Counter(cast.nouns).items() if number > 1]
            assert not repeated, f"{scene.name}: {repeated}"


# ---- English ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, several",
    [
        ("fox", "foxes"),
        ("wolf", "wolves"),
        ("cup of coffee", "cups of coffee"),
        ("pair of glasses", "pairs of glasses"),
        ("butterfly", "butterflies"),
        ("donkey", "donkeys"),
        ("sheep", "sheep"),
        ("sea lion", "sea lions"),
        ("snow goose", "snow geese"),
        ("mother with a pram", "mothers with a pram"),
        ("fly-fisher", "fly-fishers"),
        ("passerby", "passersby"),
        ("torch", "torches"),
    ],
)
def test_plurals(one, several):
    assert plural(one) == several


def test_articles_follow_the_sound_of_the_next_word():
    text = 'a apple, a hour, a unicorn, a old "a open sign", a used car, a unusual egg, A owl, a one-eyed cat, a MRI scan'
    fixed = 'an apple, an hour, a unicorn, an old "an open sign", a used car, an unusual egg, An owl, a one-eyed cat, an MRI scan'
    assert fix_articles(text) == fixed


def test_spellings_are_changed_word_by_word():
    assert american("Colourful grey greyhounds in a harbour") == "Colorful gray greyhounds in a harbor"


def test_sentences_begin_with_a_capital():
    assert capitalise('one. "two" is read. three') == 'One. "Two" is read. Three'


@pytest.mark.parametrize(
    "pattern",
    [
        r"  |^ | $| [,.]",  # blanks
        r"[{}\[\]()|;+~=<>]|\bNone\b",  # slots that were not filled
        r"\b[Aa] (?=[aeio](?!ne\b|ne-|nce\b|uropean|wer|ucalyptus|w))",  # a apple
        r"\b[Aa]n (?![aeiouAEIOU\"8]|hour|honest|heir|X-|MRI|LED|SOS|11|18)",  # an pear
        r"\b(a|an|the|of|with|in|and) \1\b|\b(a|an) (the|a|an)\b",
        r",,|\.\.|,\.|, and$|\bwith$|\bof$|\bthe$|\band$",
        r"\. [a-z]",
        r"\b(two|three|four|five|six|several) (?:[a-z-]+ )?(man|woman|child|person|mouse|goose|wolf|leaf)\b",
        r"\b(mans|womans|childs|persons|mouses|gooses|wolfs|sheeps|fishs|peoples)\b",
    ],
)
def test_no_prompt_breaks_a_rule_of_english(pattern, prompts, held_out):
    found = [prompt for prompt in (*prompts, *held_out) if re.search(pattern, prompt)]
    assert not found, found[:3]


def test_subjects_and_verbs_agree(prompts):
    wrong = re.compile(
        r"^(?:a|an|the [a-z]+ of) (?:[a-z-]+ ){1,2}are [a-z]+ing\b|^(?:two|three|several) .{3,30}? is [a-z]+ing\b",
        re.I,
    )
    found = [
        prompt for prompt in prompts if wrong.search(prompt) and not re.match(r"a [a-z]+ of ", prompt, re.I)
    ]
    assert not found, found[:3]


@pytest.mark.parametrize(
    "prompt",
    [
        "a bearded girl",
        "sunflowers in falling snow",
        "a cow under a clear blue sky, drizzle",
        "an elderly toddler reading",
        "a beach in heavy rain at midnight, bright midday sun",
        "a wide shot of a cat, close-up",
        "a dog in June, icicles on the roof",
    ],
)
def test_a_contradiction_is_found(prompt):
    assert contradicts_itself(prompt)


def test_no_prompt_contradicts_itself(prompts):
    assert not any(map(contradicts_itself, prompts))
    assert not contradicts_itself("a girl with a kite in the snow, soft morning light")


# ---- templates --------------------------------------------------------------------------------------------


def test_a_template_is_filled_by_slots_alternatives_and_options():
    template = parse("a {colour} (cat|dog)[ with {thing+s}]")
    assert slots(template) == {"colour", "thing+s"}
    texts = {expand(template, lambda name: name.upper(), Choices(seed)) for seed in range(40)}
    assert texts == {f"a COLOUR {one}{end}" for one in ("cat", "dog") for end in ("", " with THING+S")}


@pytest.mark.parametrize("text", ["a {cat", "a (cat", "a [cat", "a cat]", "a (cat]"])
def test_a_template_with_an_open_bracket_is_refused(text):
    with pytest.raises(ValueError, match="bracket"):
        parse(text)


def test_the_benchmark_prints_prompts_and_writes_their_figures(tmp_path):
    process = run_script(
        "benchmarks/prompts.py", "--count", 300, "--show", 3, "--json", tmp_path / "figures.json"
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[:3] == varied_prompts(0, 3)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (
        figures["prompts"] == 300 and figures["distinct_words"] > 1000 and figures["repeated_candidates"] < 9
    )
    assert sum(row["percent"] for row in figures["lengths"]) == pytest.approx(100, abs=0.5)
