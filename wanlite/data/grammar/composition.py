"""A seed and a number -> a prompt: the number decides the length, then a scene, a form and its words."""

from collections.abc import Iterator
from functools import cache
from itertools import count
from string import capwords

from .choices import Choices
from .contradictions import contradicts_itself
from .english import american, capitalise, fix_articles, plural, words_of
from .held_out import is_held_out
from .templates import Template, expand
from .vocabulary import Scene, read_vocabulary

SHARES = {
    "word": 2,
    "phrase": 11,
    "short": 24,
    "medium": 22,
    "long": 23,
    "extended": 18,
}  # percent of prompts
MAX_ATTEMPTS = 1000  # of a prompt on one side of the held-out rule
LENGTHS_BY_SHARE = [name for name, share in SHARES.items() for _ in range(share)]
LENGTHS_WITH_PAIRS = [name for name in LENGTHS_BY_SHARE if name not in ("word", "phrase")]
TINY = frozenset(("with", "from", "into", "over", "under", "behind", "their", "beside", "through", "between"))


def varied_prompts(seed: int, number: int, held_out: bool = False) -> list[str]:
    """Return `number` different prompts; a longer list of the same seed and side begins with a shorter one."""
    prompts: dict[str, None] = {}
    for prompt in _stream(seed, held_out):
        prompts[prompt] = None
        if len(prompts) >= number:
            return list(prompts)
    raise AssertionError("the stream never ends")


def _stream(seed: int, held_out: bool) -> Iterator[str]:
    for index in count():
        yield compose(seed, index, held_out)


def compose(seed: int, index: int, held_out: bool = False) -> str:
    """Return one prompt, a function of the arguments alone; two indices may give the same.

    With `held_out` it names a held-out pair of words, and else it names none.
    """
    length = _length(Choices(seed, index), held_out)
    for attempt in range(MAX_ATTEMPTS):
        prompt = _compose(length, Choices(seed, index, int(held_out), attempt))
        if is_held_out(prompt) == held_out and not _repeats_itself(prompt) and not contradicts_itself(prompt):
            return prompt
    raise AssertionError(f"no prompt of seed {seed} and index {index}")


def _length(choices, held_out):
    """Return one of LENGTHS; prompts of a word or two name no pair of words."""
    return choices.pick(LENGTHS_WITH_PAIRS if held_out else LENGTHS_BY_SHARE)


def _compose(length, choices):
    scene = choices.pick(_lottery(length))
    form = choices.pick(scene.forms[length])
    text = expand(form, Composition(scene, choices).fill, choices)
    text = fix_articles(" ".join(text.split()).replace(" ,", ",").replace(" .", "."))
    if choices.happens(50):
        text = american(text)
    if ". " in text or text.endswith("."):
        return capitalise(text)
    return _punctuate(text, choices) if length not in ("word",) else text


def _punctuate(text, choices):
    """Return a prompt of one sentence or less, with or without a capital and a full stop as people write."""
    if choices.happens(40):
        text = capitalise(text)
        return f"{text}." if choices.happens(30) and "," not in text else text
    return text


@cache
def _lottery(length: str) -> list[Scene]:
    return [scene for scene in read_vocabulary().lottery if length in scene.forms]


def _repeats_itself(prompt):
    """Return whether a word follows itself, or a long word comes twice, or three times in a long prompt."""
    words = words_of(prompt)
    if any(map(str.__eq__, words, words[1:])):
        return True
    long = [word for word in words if len(word) > 3 and word not in TINY]
    most = 1 + (len(words) > 45)
    return len(set(long)) < len(long) and any(long.count(word) > most for word in set(long))


class Composition:
    """The slots of one prompt: what is chosen first decides what fits later, and no entry comes twice."""

    def __init__(self, scene: Scene, choices: Choices):
        self.scene, self.choices, self.used = scene, choices, set()
        self.lists = (choices.pick(read_vocabulary().media), scene.lists)
        if scene.casts:
            self.cast = choices.pick(scene.casts)
            self.lists = (self.cast.lists, *self.lists)
            self.noun, self.is_plural, self.number = self._choose_noun(self.cast, 20)

    def fill(self, name: str) -> str:
        """Return the text of a slot: of this composition, of the cast, of the medium, or of the scene."""
        if name in SLOTS:
            return SLOTS[name](self)
        if name.endswith("+s"):
            return plural(self.fill(name.removesuffix("+s")))
        if name.startswith("quoted "):
            return self._quoted(self.fill(name.removeprefix("quoted ")))
        for lists in self.lists:
            if name in lists:
                return self._entry(lists[name])
        raise KeyError(name)

    def _entry(self, entries: tuple[Template, ...]) -> str:
        """Return one of the entries that were not used in this prompt."""
        start = self.choices.below(len(entries))
        for entry in entries[start:] + entries[:start]:
            if id(entry) not in self.used:  # equal texts are one template, by the cache of parse()
                break
        self.used.add(id(entry))
        return expand(entry, self.fill, self.choices)

    def _choose_noun(self, cast, percent):
        """Return (noun, whether it is plural, the words before it)."""
        noun = self.choices.pick(cast.nouns)
        if noun[0] in "~=":
            return noun[1:], noun[0] == "~", ""
        if "groups" in cast.lists and self.choices.happens(percent):
            return plural(noun), True, self._entry(cast.lists["groups"])
        return noun, False, "a"

    def _described(self, cast, noun, percent):
        """Return a noun, in some of the cases with an adjective."""
        if "adjectives" in cast.lists and self.choices.happens(percent):
            return f"{self._entry(cast.lists['adjectives'])} {noun}"
        return noun

    def _quoted(self, text):
        """Return lettering between quotation marks, in one of the ways that letters are written."""
        change = self.choices.pick((str.upper, str.upper, capwords, str))
        return f'"{change(text)}"'

    def slot_np(self):
        """The subject, as `a weathered fishing boat`."""
        return f"{self.number} {self._described(self.cast, self.noun, 65)}"

    def slot_plain(self):
        return f"{self.number} {self.noun}"

    def slot_bare(self):
        """The subject as a tag, as `weathered fishing boat`."""
        number = "" if self.number == "a" else self.number
        return f"{number} {self._described(self.cast, self.noun, 65)}"

    def slot_noun(self):
        return self.noun

    def slot_the(self):
        return f"the {self.noun}"

    def slot_is(self):
        return "are" if self.is_plural else "is"

    def slot_act(self):
        return self._entry(self.cast.lists["actions"])

    def slot_trait(self):
        return self._entry(self.cast.lists["traits"]) if "traits" in self.cast.lists else ""

    def slot_other(self):
        """Another subject of the scene."""
        others = [cast for cast in self.scene.casts if cast is not self.cast] or self.scene.casts
        cast = self.choices.pick(others)
        noun, self.other_is_plural, number = self._choose_noun(cast, 15)
        self.other_cast = cast
        return f"{number} {self._described(cast, noun, 50)}"

    def slot_other_is(self):
        """The verb of the other subject; after `other`."""
        return "are" if self.other_is_plural else "is"

    def slot_act_other(self):
        """What the other subject does; after `other`."""
        return self._entry(self.other_cast.lists["actions"])


SLOTS = {
    name.removeprefix("slot_"): method
    for name, method in vars(Composition).items()
    if name.startswith("slot_")
}
