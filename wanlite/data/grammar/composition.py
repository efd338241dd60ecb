"""A seed and a number -> a prompt: the number decides the length, then a scene, a form and its words."""

from collections.abc import Callable
from functools import cache
from itertools import count
from string import capwords

from ...runtime.progress import track
from .choices import Choices
from .contradictions import contradicts_itself
from .english import american, capitalise, fix_articles, plural, words_of
from .held_out import is_held_out
from .templates import Template, expand
from .vocabulary import Cast, Lists, Scene, read_vocabulary

SHARES = {
    "word": 2,
    "phrase": 11,
    "short": 24,
    "medium": 22,
    "long": 23,
    "extended": 18,
}  # percent of prompts
LENGTHS = [name for name, share in SHARES.items() for _ in range(share)]
LENGTHS_WITH_PAIRS = [name for name in LENGTHS if name not in ("word", "phrase")]  # the others name one thing
MAX_ATTEMPTS = 1000  # of a prompt; two of three are used, and one of twenty that are held out
PLURALS, OTHER_PLURALS = 20, 15  # percent of the subjects, and of those beside them
ADJECTIVES, OTHER_ADJECTIVES = 65, 50
AMERICAN, CAPITAL, FULL_STOP = 50, 40, 30  # percent of the prompts that are written so
LONG_PROMPT = 45  # words; a longer prompt may have a long word twice
LONG_WORD = 4  # letters
CASES: tuple[Callable[[str], str], ...] = (str.upper, str.upper, capwords, str)  # of lettering
REPEATABLE = frozenset(
    ("with", "from", "into", "over", "under", "behind", "their", "beside", "through", "between")
)


def varied_prompts(seed: int, number: int, held_out: bool = False) -> list[str]:
    """Return `number` different prompts; a longer list of the same seed and side begins with a shorter one.

    Prompts that are `held_out` name a subject and a place that never meet in the others.
    """
    prompts: dict[str, None] = {}
    with track(number, "composing prompts") as progress:
        for index in count():
            if len(prompts) >= number:
                break
            prompt = compose(seed, index, held_out)
            progress.update(prompt not in prompts)
            prompts[prompt] = None
    return list(prompts)


def compose(seed: int, index: int, held_out: bool = False) -> str:
    """Return one prompt, a function of the arguments alone; two indices seldom give the same."""
    length = Choices(seed, index).pick(LENGTHS_WITH_PAIRS if held_out else LENGTHS)
    for attempt in range(MAX_ATTEMPTS):
        prompt = _compose(length, Choices(seed, index, int(held_out), attempt))
        if is_held_out(prompt) == held_out and not _repeats_itself(prompt) and not contradicts_itself(prompt):
            return prompt
    raise AssertionError(f"no prompt of seed {seed} and index {index}")


def _compose(length, choices):
    scene = choices.pick(_scenes(length))
    form = choices.pick(scene.forms[length])
    text = expand(form, Composition(scene, choices).fill, choices)
    text = fix_articles(" ".join(text.split()).replace(" ,", ",").replace(" .", "."))
    text = american(text) if choices.happens(AMERICAN) else text
    return capitalise(text) if text.endswith(".") else _as_written(text, choices)


def _as_written(text, choices):
    """Return a prompt that is not a caption, with or without a capital and a full stop as people write."""
    if not choices.happens(CAPITAL):
        return text
    ends = " " in text and "," not in text and choices.happens(FULL_STOP)
    return capitalise(text) + "." * ends


@cache
def _scenes(length: str) -> list[Scene]:
    """Return the scenes that have forms of a length, each as often as its weight."""
    return [scene for scene in read_vocabulary().scenes if length in scene.forms for _ in range(scene.weight)]


def _repeats_itself(prompt):
    """Return whether a word follows itself, or a long word comes too often."""
    words = words_of(prompt)
    if any(map(str.__eq__, words, words[1:])):
        return True
    long = [word for word in words if len(word) >= LONG_WORD and word not in REPEATABLE]
    most = 1 + (len(words) > LONG_PROMPT)
    return len(set(long)) < len(long) and any(long.count(word) > most for word in set(long))


class Composition:
    """The slots of one prompt: the subject is chosen first, and no entry of a list is used twice."""

    def __init__(self, scene: Scene, choices: Choices):
        self.scene, self.choices = scene, choices
        self.used: set[int] = set()
        self.lists: list[Lists] = [choices.pick(read_vocabulary().media), scene.lists]
        if scene.casts:
            self.cast = choices.pick(scene.casts)
            self.lists.insert(0, self.cast.lists)
            self.noun, self.is_plural, self.number = self._choose_noun(self.cast, PLURALS)

    def fill(self, name: str) -> str:
        """Return the text of a slot: of this composition, else of the cast, the medium or the scene."""
        if name in SLOTS:
            return SLOTS[name](self)
        if name.endswith("+s"):
            return plural(self.fill(name.removesuffix("+s")))
        if name.startswith("quoted "):
            return self._quote(self.fill(name.removeprefix("quoted ")))
        for lists in self.lists:
            if name in lists:
                return self._pick(lists[name])
        raise KeyError(f"scene {self.scene.name} has no list {name}")

    def _pick(self, entries: tuple[Template, ...]) -> str:
        """Return an entry that was not used in this prompt, if there is one."""
        start = self.choices.below(len(entries))
        for entry in entries[start:] + entries[:start]:
            if id(entry) not in self.used:  # equal texts are one object, by parse()
                break
        self.used.add(id(entry))
        return expand(entry, self.fill, self.choices)

    def _quote(self, text):
        """Return lettering in quotation marks, in one of the ways that letters are written."""
        return f'"{self.choices.pick(CASES)(text)}"'

    def _choose_noun(self, cast: Cast, percent: int) -> tuple[str, bool, str]:
        """Return (noun, whether it is plural, the words before it)."""
        noun = self.choices.pick(cast.nouns)
        if noun[0] in "~=":
            return noun[1:], noun[0] == "~", ""
        if "groups" in cast.lists and self.choices.happens(percent):
            return plural(noun), True, self._pick(cast.lists["groups"])
        return noun, False, "a"

    def _describe(self, cast, noun, percent):
        """Return a noun, in some of the cases with an adjective."""
        if "adjectives" in cast.lists and self.choices.happens(percent):
            return f"{self._pick(cast.lists['adjectives'])} {noun}"
        return noun

    def subject(self) -> str:
        """The subject, as `a weathered fishing boat`."""
        return f"{self.number} {self._describe(self.cast, self.noun, ADJECTIVES)}"

    def plain_subject(self) -> str:
        """The subject without adjectives, as `a fishing boat`."""
        return f"{self.number} {self.noun}"

    def bare_subject(self) -> str:
        """The subject as a tag, as `weathered fishing boat`."""
        number = "" if self.number == "a" else self.number
        return f"{number} {self._describe(self.cast, self.noun, ADJECTIVES)}"

    def named_subject(self) -> str:
        """The subject when it comes again, as `the fishing boat`."""
        return f"the {self.noun}"

    def verb(self) -> str:
        return "are" if self.is_plural else "is"

    def action(self) -> str:
        return self._pick(self.cast.lists["actions"])

    def trait(self) -> str:
        return self._pick(self.cast.lists["traits"]) if "traits" in self.cast.lists else ""

    def other(self) -> str:
        """Another subject of the scene."""
        casts = [cast for cast in self.scene.casts if cast is not self.cast] or self.scene.casts
        self.other_cast = self.choices.pick(casts)
        noun, self.other_is_plural, number = self._choose_noun(self.other_cast, OTHER_PLURALS)
        return f"{number} {self._describe(self.other_cast, noun, OTHER_ADJECTIVES)}"

    def other_verb(self) -> str:
        return "are" if self.other_is_plural else "is"

    def other_action(self) -> str:
        return self._pick(self.other_cast.lists["actions"])


SLOTS: dict[str, Callable[[Composition], str]] = {
    "np": Composition.subject,
    "plain": Composition.plain_subject,
    "bare": Composition.bare_subject,
    "noun": lambda composition: composition.noun,
    "the": Composition.named_subject,
    "is": Composition.verb,
    "act": Composition.action,
    "trait": Composition.trait,
    "other": Composition.other,
    "other_is": Composition.other_verb,
    "act_other": Composition.other_action,
}
