"""Words -> their plurals, articles and spellings."""

import re

IRREGULAR = {
    **{
        word: word
        for word in ("sheep", "deer", "fish", "moose", "bison", "salmon", "trout", "squid", "aircraft")
    },
    **{
        word: word
        for word in (
            "spacecraft",
            "hovercraft",
            "elk",
            "koi",
            "chamois",
            "swordfish",
            "jellyfish",
            "clownfish",
        )
    },
    **{word: word for word in ("starfish", "reindeer", "bonsai", "tuna", "plankton", "cattle", "carp")},
    "woman": "women",
    "man": "men",
    "child": "children",
    "person": "people",
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "foot": "feet",
    "tooth": "teeth",
    "cactus": "cacti",
    "fungus": "fungi",
    "passerby": "passersby",
    "die": "dice",
    "gateau": "gateaux",
    **{word: f"{word}es" for word in ("potato", "tomato", "mango", "buffalo", "volcano", "hero", "mosquito")},
    **{
        word: f"{re.sub('fe?$', '', word)}ves"
        for word in ("wolf", "leaf", "loaf", "shelf", "knife", "calf", "scarf", "elf", "dwarf", "half")
    },
}
NO_VOWEL_SOUND = re.compile(r"(?:eu|ew|u(?:ni(?![nm])|s(?:e|u)|k|tens|fo\b)|on(?:e|ce)\b)", re.I)
VOWEL_SOUND = re.compile(r"(?:[Hh]our|[Hh]onest|[Hh]eir|MRI|LED|SOS|X\b|8|11\b|18\b)")
ARTICLE = re.compile(r"\b([Aa]) (?=\W?(\w+))")
WORD = re.compile(r"[^\W\d_]+(?:[-'/][^\W_]+)*")
HEAD = re.compile(r"^(.*?)( (?:of|with|in|on|at|from|made|full|under|for) .*)?$")
SENTENCE = re.compile(r'(^|[.!?]"? )(["]?)([a-z])')
AMERICAN = {
    "colour": "color",
    "grey": "gray",
    "harbour": "harbor",
    "neighbour": "neighbor",
    "armour": "armor",
    "theatre": "theater",
    "centre": "center",
    "jewellery": "jewelry",
    "plough": "plow",
    "pyjamas": "pajamas",
    "catalogue": "catalog",
    "vapour": "vapor",
    "flavour": "flavor",
    "moustache": "mustache",
    "fibre": "fiber",
    "sceptre": "scepter",
    "aeroplane": "airplane",
    "tyre": "tire",
    "yoghurt": "yogurt",
    "recognisable": "recognizable",
    "stylised": "stylized",
    "visualisation": "visualization",
    "synchronised": "synchronized",
    "caramelised": "caramelized",
}
AMERICAN |= {word.capitalize(): spelled.capitalize() for word, spelled in AMERICAN.items()}
BRITISH_WORD = re.compile(f"(?:{'|'.join(AMERICAN)})(?!hound)")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())


def plural(noun: str) -> str:
    """Return the plural of a noun phrase: its head is the last word before a preposition."""
    match = HEAD.match(noun)
    head, rest = match.groups() if match else (noun, None)
    before, space, word = head.rpartition(" ")
    first, hyphen, last = word.rpartition("-")
    return f"{before}{space}{first}{hyphen}{_plural_of_word(last)}{rest or ''}"


def _plural_of_word(word):
    if word in IRREGULAR:
        return IRREGULAR[word]
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return f"{word}es"
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}s"


def fix_articles(text: str) -> str:
    """Return the text with `a` or `an` by the sound of the next word."""
    return ARTICLE.sub(lambda match: f"{match[1]}{'n' * _begins_with_vowel(match[2])} ", text)


def _begins_with_vowel(word):
    if word[0].lower() in "aeiou":
        return not NO_VOWEL_SOUND.match(word)
    return bool(VOWEL_SOUND.match(word))


def capitalise(text: str) -> str:
    """Return the text with a capital at the start of each sentence."""
    return SENTENCE.sub(lambda match: f"{match[1]}{match[2]}{match[3].upper()}", text)


def american(text: str) -> str:
    """Return a text of British spelling in American spelling."""
    return BRITISH_WORD.sub(lambda match: AMERICAN[match[0]], text)


def head_word(noun: str) -> str:
    """Return the word of a noun phrase that takes the plural."""
    match = HEAD.match(noun)
    return (match[1] if match else noun).rpartition(" ")[2]
