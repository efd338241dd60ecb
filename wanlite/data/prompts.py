"""Prompts, from a file of any usual kind or from a grammar of ours; no torch, so that a wrong path is
answered at once.
"""

import csv
import io
import json
import random
from pathlib import Path

COLUMNS = ("prompt", "text", "caption")  # a table's column of prompts is called one of these
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # any other name: text, one prompt a line
SEPARATORS = {
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "vertical bars",
}  # that spreadsheets write between cells
PACKED = (
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"\xfd7zXZ",
    b"BZh",
    b"\x28\xb5\x2f\xfd",
)  # how gzip, zip, xz, bzip2 and zstd begin
MAX_NAMED = 5  # rows without a prompt that are named


# ---- files -------------------------------------------------------------------------------------------------


def read_prompts(path, say=None):
    """Return the prompts of a text file, one a line, or of a table's (see KINDS) column prompt, text or
    caption.

    Rows without a prompt are left out; `say` is told which. Raises OSError where the file cannot be read and
    ValueError where it holds no prompt or is not what its name says.
    """
    path = Path(path)
    if not path.exists():
        raise OSError(
            f"{path}: no such file. Expected a text file with one prompt a line, or {', '.join(KINDS)}."
        )
    if not path.is_file():
        raise OSError(
            f"{path}: not a file. Expected a text file with one prompt a line, or {', '.join(KINDS)}."
        )
    is_table = path.suffix.lower() in KINDS
    try:
        rows = _table(path) if is_table else _lines(path)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}, in line {line}). Save it as UTF-8."
        ) from None
    prompts = {number: prompt.strip() if isinstance(prompt, str) else "" for number, prompt in rows}
    for number, prompt in prompts.items():
        check_text(prompt, f"{path}: row {number}")
    found = [prompt for prompt in prompts.values() if prompt]
    if not found:
        raise ValueError(f"{path}: holds no prompt. Write one prompt a {'row' if is_table else 'line'}.")
    if (empty := [number for number, prompt in prompts.items() if not prompt]) and say:
        named = ", ".join(map(str, empty[:MAX_NAMED])) + (", ..." if len(empty) > MAX_NAMED else "")
        say(f"{path}: {len(empty)} of {len(prompts)} rows hold no prompt and are left out: {named}")
    return found


def check_text(text, source):
    """Raise ValueError for text that UTF-8 cannot encode: JSON's escapes can write half a character, and
    tables any bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source} holds {ascii(text[error.start])}, not a character that UTF-8 can encode. Write it "
            f"again."
        ) from None


def _read_text(path):
    content = path.read_bytes()
    if content.startswith(PACKED):
        raise ValueError(f"{path}: is compressed, expected text. Unpack it.")
    text = content.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError(f"{path}: holds zero bytes; it is UTF-16, or no text. Save it as UTF-8.")
    if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise ValueError(f"{path}: is a web page, expected a file of prompts. Download the file itself.")
    return text


def _lines(path):
    lines = (
        _read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    )  # a JSON string may hold other separators
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_rows(path):
    """Return the names of the columns and [(number, row)] of a .jsonl, .json, .csv or .tsv file; a row is a
    dict, or what JSON holds in its place. Raises ValueError."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_csv(path)
    rows = _read_json(path)
    return list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row)), rows


def _read_json(path):
    is_list = path.suffix.lower() == ".json"
    if is_list:
        try:
            rows = json.loads(_read_text(path))
        except RecursionError:
            raise ValueError(f"{path}: is nested too deep for a list of prompts.") from None
        except json.JSONDecodeError:
            rows = None  # lines of JSON under another name
        if isinstance(rows, list):
            return list(enumerate(rows, 1))
    rows = []
    for number, line in _lines(path):
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            raise ValueError(
                f"{path}: line {number} is not JSON. Expected an object or a string a line"
                f"{', or one list of them' if is_list else ''}."
            ) from None
    return rows


def _read_csv(path):
    """Return the names of the columns, which are row 1, and the rows as dicts; a row of more cells than names
    is refused.
    """
    lines = io.StringIO(_read_text(path), newline="").readlines()
    separator = _find_separator(path, lines)
    (_, names, _), *records = [*_records(path, lines, separator)] or [(1, [], False)]
    rows = []
    for number, cells, is_quoted in records:
        if len(names) == 1 and separator == "," and not is_quoted:
            cells = [",".join(cells)]  # the commas are the prompt's
        if len(cells) > len(names):
            raise ValueError(
                f"{path}: row {number} has {len(cells)} cells, the header {len(names)}: quote prompts with "
                f"{SEPARATORS[separator]}."
            )
        rows.append((number, dict(zip(names, cells))))
    return names, rows


def _find_separator(path, lines):
    """Return the separator that the file's name says, or the one under which its header has a column of
    prompts.
    """
    expected = "\t" if path.suffix.lower() == ".tsv" else ","
    header = next((line for line in lines if line.strip()), "")
    return next(
        (
            separator
            for separator in (expected, *SEPARATORS)
            if _columns_of(COLUMNS, [name.strip(' "\r\n') for name in header.split(separator)])
        ),
        expected,
    )


def _records(path, lines, separator):
    """Yield (number, cells, whether any is quoted) of each row; empty cells at its end, which spreadsheets
    write, do not count.
    """
    reader, start = csv.reader(lines, delimiter=separator, strict=True), 0  # strict: every quote is closed
    try:
        for number, cells in enumerate(reader, 1):
            is_quoted = separator.join(cells) != "".join(lines[start : reader.line_num]).rstrip("\r\n")
            start = reader.line_num
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield number, cells, is_quoted
    except csv.Error as error:
        raise ValueError(
            f"{path}: cannot be read as {path.suffix[1:].upper()} (line {start + 1}: {error}). Write it "
            f"again."
        ) from None


def _table(path):
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path)
    names, rows = read_rows(path)
    if kind in (".csv", ".tsv"):
        column = find_column(path, names)
        return [(number, row.get(column)) for number, row in rows]
    return [
        (
            number,
            row if isinstance(row, str) else row[find_column(path, row)] if isinstance(row, dict) else None,
        )
        for number, row in rows
    ]


def _parquet(path):
    import pyarrow
    from pyarrow import parquet

    try:
        column = find_column(path, parquet.read_schema(path).names)
        return list(enumerate(read_texts(parquet.read_table(path, columns=[column])[column]), 1))
    except (pyarrow.ArrowException, OSError) as error:  # the latter of a damaged page
        raise ValueError(
            f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}). Write it again."
        ) from None


def read_texts(column):
    """Return the cells of an Arrow column; bytes that are not UTF-8 become characters that check_text()
    refuses.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)

    def read(cell):
        try:
            return cell.as_py()
        except UnicodeDecodeError:
            return cell.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")

    return [read(cell) for cell in column]


def find_column(path, names, wanted=COLUMNS):
    """Return the name of the column that holds prompts, or whatever else is `wanted`: the first of these that
    is there, once.
    """
    found = _columns_of(wanted, names)
    expected = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
    if not found:
        raise ValueError(
            f"{path}: has the columns {', '.join(map(str, names)) or 'of nothing'}, expected one called "
            f"{expected}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{path}: has {len(found)} columns called {found[0].strip()}, expected one. Rename the others."
        )
    return found[0]


def _columns_of(wanted, names):
    """Return the names that are the first of `wanted` that any is, whatever their case."""
    called = ([name for name in names if name and name.strip().lower() == each] for each in wanted)
    return next(filter(None, called), [])


# ---- a grammar ---------------------------------------------------------------------------------------------

# Each rule is a list of ways to say it; {name} stands for a rule. Long rules keep thousands of prompts apart.
GRAMMAR = {
    "prompt": [
        "{picture}",
        "{picture}",
        "{picture}, {light}",
        "{picture}, {light}, {view}",
        "{style} of {scene}",
        "{style} of {scene}, {light}",
        "{scene}, {style}, {palette}",
        "{scene}, {view}, {light}, {palette}",
        "{thing}",
        "{people} portrait, {light}, {view}",
    ],
    "picture": ["a photo of {scene}", "{style} of {scene}", "{scene}"],
    "scene": [
        "{animal} {doing} {place}",
        "{person} {acting} {place}",
        "{person} with {animal} {place}",
        "{object} {lying}",
        "{object} and {object} {lying}",
        "{number} {objects} {lying}",
        "{building} {where}",
        "{landscape}",
        "{landscape} with {building} in the distance",
        "{vehicle} {moving} {place}",
        "{food} on {surface}",
        "{object} to the left of {object}",
        "{object} on top of {object}",
        "{animal} behind {object}",
        'a sign that says "{word}" {where}',
        "{plant} {where}",
    ],
    "thing": ["{object}", "{animal}", "{food}", "{building}", "{plant}", "{vehicle}"],
    "animal": ["{fur} {creature}", "{creature_a}", "{fur} {creature} with {detail}"],
    "fur": [
        "a small",
        "an old",
        "a young",
        "a sleepy",
        "a curious",
        "a spotted",
        "a black",
        "a white",
        "a grey",
        "a huge",
    ],
    "creature": [
        "cat",
        "dog",
        "fox",
        "owl",
        "horse",
        "rabbit",
        "parrot",
        "turtle",
        "elephant",
        "tiger",
        "bear",
        "frog",
        "penguin",
        "deer",
        "goat",
        "hedgehog",
        "octopus",
        "lizard",
        "wolf",
        "otter",
        "sheep",
        "swan",
        "squirrel",
        "koala",
        "crab",
    ],
    "creature_a": [
        "a herd of {creatures}",
        "two {creatures}",
        "three {creatures} in a row",
        "a flock of {birds}",
    ],
    "creatures": ["zebras", "sheep", "horses", "elephants", "goats", "deer", "kittens", "puppies", "foxes"],
    "birds": ["starlings", "flamingos", "seagulls", "crows", "geese"],
    "detail": [
        "a red scarf",
        "a blue ribbon",
        "bright green eyes",
        "a tiny hat",
        "muddy paws",
        "a golden bell",
    ],
    "doing": [
        "sleeping",
        "sitting",
        "running",
        "looking into the camera",
        "jumping",
        "standing",
        "hiding",
        "playing",
        "drinking",
    ],
    "person": [
        "a woman",
        "a man",
        "an old fisherman",
        "a child",
        "a young chef",
        "a violinist",
        "an astronaut",
        "a mechanic",
        "a grandmother",
        "a cyclist",
        "a dancer in a yellow dress",
        "a farmer in a straw hat",
        "a nurse",
        "a monk",
        "two friends",
        "a girl with freckles",
        "a bearded man in a green coat",
        "a knight in armour",
        "a street musician",
    ],
    "people": [
        "a woman's",
        "an old man's",
        "a young boy's",
        "a sailor's",
        "a dancer's",
        "a scientist's",
        "a bride's",
    ],
    "acting": [
        "reading",
        "walking",
        "laughing",
        "painting",
        "waiting",
        "cooking",
        "dancing",
        "repairing a bicycle",
        "holding an umbrella",
        "playing chess",
        "carrying a box",
        "drinking tea",
        "watering flowers",
        "taking a photo",
    ],
    "place": [
        "in a forest",
        "on a beach",
        "in a small kitchen",
        "in the snow",
        "on a city street",
        "in a field of poppies",
        "in a library",
        "under a bridge",
        "on a mountain trail",
        "at a market",
        "beside a lake",
        "in a greenhouse",
        "in an empty train station",
        "on a rooftop",
        "in the desert",
        "in a workshop",
        "at a harbour",
        "in heavy rain",
        "in a living room",
        "by a campfire",
        "in a museum",
        "on a wooden pier",
    ],
    "where": [
        "at the edge of a cliff",
        "in the fog",
        "beside a river",
        "in a quiet village",
        "on a hill",
        "at a crossroads",
        "between tall trees",
        "under a starry sky",
        "in the middle of a city",
        "by the sea",
        "in an old garden",
    ],
    "number": ["two", "three", "four", "five", "six", "a pile of", "a row of"],
    "colour": [
        "red",
        "blue",
        "green",
        "yellow",
        "white",
        "black",
        "violet",
        "purple",
        "pink",
        "brown",
        "turquoise",
        "silver",
    ],
    "material": [
        "wooden",
        "glass",
        "metal",
        "porcelain",
        "leather",
        "paper",
        "stone",
        "plastic",
        "knitted",
        "rusty",
        "golden",
    ],
    "noun": [
        "cup",
        "vase",
        "chair",
        "clock",
        "book",
        "lamp",
        "suitcase",
        "teapot",
        "bicycle",
        "guitar",
        "umbrella",
        "shoe",
        "key",
        "camera",
        "candle",
        "bowl",
        "telephone",
        "typewriter",
        "mirror",
        "ball",
        "box",
        "kite",
        "hat",
        "ladder",
        "bottle",
    ],
    "object": ["a {colour} {noun}", "a {material} {noun}"],
    "objects": ["{colour} {noun}s", "{material} {noun}s", "{noun}s"],
    "lying": [
        "on {surface}",
        "{place}",
        "in front of a {colour} wall",
        "on a {colour} background",
        "beside a window",
    ],
    "surface": [
        "a wooden table",
        "a marble counter",
        "a checkered tablecloth",
        "a stone floor",
        "a carpet",
        "wet sand",
        "a stack of books",
        "a white plate",
        "a shelf",
        "green grass",
    ],
    "building": [
        "a lighthouse",
        "a castle",
        "a small cottage",
        "a skyscraper",
        "a wooden church",
        "a red barn",
        "a windmill",
        "an old factory",
        "a pagoda",
        "a stone bridge",
        "a glass pavilion",
        "a row of colourful houses",
        "a ruined temple",
    ],
    "landscape": [
        "snowy mountains above a valley",
        "rolling green hills",
        "a waterfall in the jungle",
        "dunes at noon",
        "a frozen lake",
        "a winding road through a forest",
        "a rocky coast with high waves",
        "a field of lavender",
        "a canyon with a river",
        "terraced rice fields",
        "a volcano above the clouds",
        "a meadow full of wild flowers",
        "a calm sea",
        "birch trees in autumn",
        "a city skyline",
        "a swamp with dead trees",
    ],
    "vehicle": [
        "a red tram",
        "an old truck",
        "a sailing boat",
        "a steam train",
        "a yellow taxi",
        "a hot-air balloon",
        "a motorcycle",
        "a fishing boat",
        "a tractor",
        "a fire engine",
        "a small plane",
        "a racing car",
    ],
    "moving": ["parked", "driving", "standing", "seen from behind", "half hidden", "arriving"],
    "food": [
        "a bowl of ramen",
        "sliced oranges",
        "a chocolate cake with candles",
        "fresh bread",
        "a plate of pasta",
        "grapes and cheese",
        "a cup of coffee with foam",
        "a pizza with basil",
        "strawberries in a basket",
        "pancakes with syrup",
        "a salad",
        "sushi",
    ],
    "plant": [
        "a cactus in a {colour} pot",
        "a bonsai tree",
        "sunflowers",
        "a lone oak tree",
        "red tulips",
        "a mossy log with mushrooms",
        "a cherry tree in bloom",
        "tall bamboo",
        "water lilies",
    ],
    "word": ["OPEN", "HELLO", "CAFE", "EXIT", "WELCOME", "FRESH FISH", "NO PARKING", "BOOKS", "2049"],
    "style": [
        "a watercolour",
        "an oil painting",
        "a pencil sketch",
        "a woodcut print",
        "a 3D render",
        "a low-poly illustration",
        "pixel art",
        "a children's book illustration",
        "a comic panel",
        "a black and white photo",
        "a film still",
        "an ink drawing",
        "a charcoal drawing",
        "a vintage postcard",
        "a paper cut-out",
        "a stained glass window",
        "a claymation scene",
        "a technical blueprint",
        "a poster",
        "a mosaic",
        "a macro photo",
        "a polaroid photo",
    ],
    "light": [
        "soft morning light",
        "golden hour",
        "harsh midday sun",
        "neon light",
        "candlelight",
        "overcast sky",
        "moonlight",
        "backlit",
        "studio lighting",
        "dramatic shadows",
        "light through blinds",
        "a thunderstorm",
        "at dusk",
        "at night",
    ],
    "view": [
        "close-up",
        "wide shot",
        "from above",
        "from below",
        "shallow depth of field",
        "in profile",
        "symmetrical composition",
        "seen through a window",
        "aerial view",
        "long exposure",
        "off-centre composition",
        "minimalist",
    ],
    "palette": [
        "pastel colours",
        "muted earth tones",
        "vivid colours",
        "monochrome blue",
        "red and gold",
        "high contrast",
        "warm colours",
        "cold colours",
        "faded colours",
    ],
}


def varied_prompts(seed, count):
    """Return `count` different prompts of the grammar, in English; the same seed gives the same prompts."""
    chooser, said = random.Random(seed), {}  # noqa: S311  # nosec B311: no secret
    while len(said) < count:
        said[_say("prompt", chooser)] = None
    return list(said)


def _say(rule, chooser):
    words = chooser.choice(GRAMMAR[rule])
    while "{" in words:
        before, _, rest = words.partition("{")
        inner, _, after = rest.partition("}")
        words = before + _say(inner, chooser) + after
    return words
