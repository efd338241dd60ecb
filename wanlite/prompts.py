"""Prompts, from a file of any usual kind or from a grammar of ours; no torch, so that a wrong path is answered at once."""

import csv
import io
import json
import random
from pathlib import Path

COLUMNS = ("prompt", "text", "caption")      # a table's column of prompts is called one of these
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")            # any other name: text, one prompt a line
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")       # how gzip, zip, xz, bzip2 and zstd begin
SHOWN = 5                                    # rows without a prompt that are named


# ---- files -----------------------------------------------------------------------------------------------------------------

def read_prompts(path, say=None):
    """Return the prompts of a text file, one a line, or of a table's (see KINDS) column prompt, text or caption.

    Rows without a prompt are left out; `say` is told which. Raises OSError where the file cannot be read and ValueError where it
    holds no prompt or is not what its name says.
    """
    path = Path(path)
    if not path.exists():
        raise OSError(f"{path}: no such file. Expected a text file with one prompt a line, or {', '.join(KINDS)}.")
    if not path.is_file():
        raise OSError(f"{path}: not a file. Expected a text file with one prompt a line, or {', '.join(KINDS)}.")
    try:
        kind = path.suffix.lower()
        rows = _lines(path) if kind not in KINDS else _parquet(path) if kind == ".parquet" else _table(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    prompts = {number: prompt.strip() if isinstance(prompt, str) else "" for number, prompt in rows}
    found = [prompt for prompt in prompts.values() if prompt]
    if not found:
        raise ValueError(f"{path}: holds no prompt. Write one prompt a {'row' if path.suffix.lower() in KINDS else 'line'}.")
    if (empty := [number for number, prompt in prompts.items() if not prompt]) and say:
        named = ", ".join(map(str, empty[:SHOWN])) + (", ..." if len(empty) > SHOWN else "")
        say(f"{path}: {len(empty)} of {len(prompts)} rows hold no prompt and are left out: {named}")
    return found


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
    lines = _read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")     # a JSON string may hold other separators
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_rows(path):
    """Return [(number, row)] of a .jsonl, .json, .csv or .tsv file: a row is a dict, or what JSON says. Raises ValueError."""
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return list(enumerate(_read_csv(path)[1], 2))
    if kind == ".json":
        try:
            rows = json.loads(_read_text(path))
        except RecursionError:
            raise ValueError(f"{path}: is nested too deep for a list of prompts.") from None
        except json.JSONDecodeError:
            rows = None                                      # lines of JSON under another name
        if isinstance(rows, list):
            return list(enumerate(rows, 1))
    rows = []
    for number, line in _lines(path):
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: line {number} is not JSON. Expected an object or a string a line"
                             f"{', or one list of them' if kind == '.json' else ''}.") from None
    return rows


def _read_csv(path):
    """Return the names of the columns, and the rows as dicts."""
    try:
        table = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True,       # strict: every quote is closed
                               delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        return table.fieldnames or (), list(table)
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({error}). Write it again.") from None


def _table(path):
    if path.suffix.lower() in (".csv", ".tsv"):
        column = find_column(path, _read_csv(path)[0])
        return [(number, row[column]) for number, row in read_rows(path)]
    return [(number, row if isinstance(row, str) else row[find_column(path, row)] if isinstance(row, dict) else None)
            for number, row in read_rows(path)]


def _parquet(path):
    import pyarrow
    from pyarrow import parquet

    try:
        column = find_column(path, parquet.read_schema(path).names)
        return list(enumerate(parquet.read_table(path, columns=[column])[column].to_pylist(), 1))
    except (pyarrow.ArrowException, OSError) as error:       # the latter of a damaged page
        raise ValueError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}). Write it again.") from None


def find_column(path, names):
    """Return the name of the column that holds prompts."""
    column = next((name for wanted in COLUMNS for name in names if name and name.strip().lower() == wanted), None)
    if column is None:
        raise ValueError(f"{path}: has the columns {', '.join(map(str, names)) or 'of nothing'}, expected one called "
                         f"{', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}.")
    return column


# ---- a grammar -------------------------------------------------------------------------------------------------------------

# Each rule is a list of ways to say it; {name} stands for a rule. Long rules keep thousands of prompts apart.
GRAMMAR = {
    "prompt": ["{picture}", "{picture}", "{picture}, {light}", "{picture}, {light}, {view}", "{style} of {scene}",
               "{style} of {scene}, {light}", "{scene}, {style}, {palette}", "{scene}, {view}, {light}, {palette}",
               "{thing}", "{people} portrait, {light}, {view}"],
    "picture": ["a photo of {scene}", "{style} of {scene}", "{scene}"],
    "scene": ["{animal} {doing} {place}", "{person} {acting} {place}", "{person} with {animal} {place}", "{object} {lying}",
              "{object} and {object} {lying}", "{number} {objects} {lying}", "{building} {where}", "{landscape}",
              "{landscape} with {building} in the distance", "{vehicle} {moving} {place}", "{food} on {surface}",
              "{object} to the left of {object}", "{object} on top of {object}", "{animal} behind {object}",
              "a sign that says \"{word}\" {where}", "{plant} {where}"],
    "thing": ["{object}", "{animal}", "{food}", "{building}", "{plant}", "{vehicle}"],
    "animal": ["{fur} {creature}", "{creature_a}", "{fur} {creature} with {detail}"],
    "fur": ["a small", "an old", "a young", "a sleepy", "a curious", "a spotted", "a black", "a white", "a grey", "a huge"],
    "creature": ["cat", "dog", "fox", "owl", "horse", "rabbit", "parrot", "turtle", "elephant", "tiger", "bear", "frog",
                 "penguin",
                 "deer", "goat", "hedgehog", "octopus", "lizard", "wolf", "otter", "sheep", "swan", "squirrel", "koala", "crab"],
    "creature_a": ["a herd of {creatures}", "two {creatures}", "three {creatures} in a row", "a flock of {birds}"],
    "creatures": ["zebras", "sheep", "horses", "elephants", "goats", "deer", "kittens", "puppies", "foxes"],
    "birds": ["starlings", "flamingos", "seagulls", "crows", "geese"],
    "detail": ["a red scarf", "a blue ribbon", "bright green eyes", "a tiny hat", "muddy paws", "a golden bell"],
    "doing": ["sleeping", "sitting", "running", "looking into the camera", "jumping", "standing", "hiding", "playing",
              "drinking"],
    "person": ["a woman", "a man", "an old fisherman", "a child", "a young chef", "a violinist", "an astronaut", "a mechanic",
               "a grandmother", "a cyclist", "a dancer in a yellow dress", "a farmer in a straw hat", "a nurse", "a monk",
               "two friends", "a girl with freckles", "a bearded man in a green coat", "a knight in armour", "a street musician"],
    "people": ["a woman's", "an old man's", "a young boy's", "a sailor's", "a dancer's", "a scientist's", "a bride's"],
    "acting": ["reading", "walking", "laughing", "painting", "waiting", "cooking", "dancing", "repairing a bicycle",
               "holding an umbrella", "playing chess", "carrying a box", "drinking tea", "watering flowers", "taking a photo"],
    "place": ["in a forest", "on a beach", "in a small kitchen", "in the snow", "on a city street", "in a field of poppies",
              "in a library", "under a bridge", "on a mountain trail", "at a market", "beside a lake", "in a greenhouse",
              "in an empty train station", "on a rooftop", "in the desert", "in a workshop", "at a harbour", "in heavy rain",
              "in a living room", "by a campfire", "in a museum", "on a wooden pier"],
    "where": ["at the edge of a cliff", "in the fog", "beside a river", "in a quiet village", "on a hill", "at a crossroads",
              "between tall trees", "under a starry sky", "in the middle of a city", "by the sea", "in an old garden"],
    "number": ["two", "three", "four", "five", "six", "a pile of", "a row of"],
    "colour": ["red", "blue", "green", "yellow", "white", "black", "violet", "purple", "pink", "brown", "turquoise", "silver"],
    "material": ["wooden", "glass", "metal", "porcelain", "leather", "paper", "stone", "plastic", "knitted", "rusty", "golden"],
    "noun": ["cup", "vase", "chair", "clock", "book", "lamp", "suitcase", "teapot", "bicycle", "guitar", "umbrella", "shoe",
             "key",
             "camera", "candle", "bowl", "telephone", "typewriter", "mirror", "ball", "box", "kite", "hat", "ladder", "bottle"],
    "object": ["a {colour} {noun}", "a {material} {noun}"],
    "objects": ["{colour} {noun}s", "{material} {noun}s", "{noun}s"],
    "lying": ["on {surface}", "{place}", "in front of a {colour} wall", "on a {colour} background", "beside a window"],
    "surface": ["a wooden table", "a marble counter", "a checkered tablecloth", "a stone floor", "a carpet", "wet sand",
                "a stack of books", "a white plate", "a shelf", "green grass"],
    "building": ["a lighthouse", "a castle", "a small cottage", "a skyscraper", "a wooden church", "a red barn", "a windmill",
                 "an old factory", "a pagoda", "a stone bridge", "a glass pavilion", "a row of colourful houses",
                 "a ruined temple"],
    "landscape": ["snowy mountains above a valley", "rolling green hills", "a waterfall in the jungle", "dunes at noon",
                  "a frozen lake", "a winding road through a forest", "a rocky coast with high waves", "a field of lavender",
                  "a canyon with a river", "terraced rice fields", "a volcano above the clouds", "a meadow full of wild flowers",
                  "a calm sea", "birch trees in autumn", "a city skyline", "a swamp with dead trees"],
    "vehicle": ["a red tram", "an old truck", "a sailing boat", "a steam train", "a yellow taxi", "a hot-air balloon",
                "a motorcycle", "a fishing boat", "a tractor", "a fire engine", "a small plane", "a racing car"],
    "moving": ["parked", "driving", "standing", "seen from behind", "half hidden", "arriving"],
    "food": ["a bowl of ramen", "sliced oranges", "a chocolate cake with candles", "fresh bread", "a plate of pasta",
             "grapes and cheese",
             "a cup of coffee with foam", "a pizza with basil", "strawberries in a basket", "pancakes with syrup", "a salad",
             "sushi"],
    "plant": ["a cactus in a {colour} pot", "a bonsai tree", "sunflowers", "a lone oak tree", "red tulips",
              "a mossy log with mushrooms",
              "a cherry tree in bloom", "tall bamboo", "water lilies"],
    "word": ["OPEN", "HELLO", "CAFE", "EXIT", "WELCOME", "FRESH FISH", "NO PARKING", "BOOKS", "2049"],
    "style": ["a watercolour", "an oil painting", "a pencil sketch", "a woodcut print", "a 3D render", "a low-poly illustration",
              "pixel art", "a children's book illustration", "a comic panel", "a black and white photo", "a film still",
              "an ink drawing", "a charcoal drawing", "a vintage postcard", "a paper cut-out", "a stained glass window",
              "a claymation scene", "a technical blueprint", "a poster", "a mosaic", "a macro photo", "a polaroid photo"],
    "light": ["soft morning light", "golden hour", "harsh midday sun", "neon light", "candlelight", "overcast sky", "moonlight",
              "backlit", "studio lighting", "dramatic shadows", "light through blinds", "a thunderstorm", "at dusk", "at night"],
    "view": ["close-up", "wide shot", "from above", "from below", "shallow depth of field", "in profile",
             "symmetrical composition",
             "seen through a window", "aerial view", "long exposure", "off-centre composition", "minimalist"],
    "palette": ["pastel colours", "muted earth tones", "vivid colours", "monochrome blue", "red and gold", "high contrast",
                "warm colours", "cold colours", "faded colours"]}


def varied_prompts(seed, count):
    """Return `count` different prompts of the grammar, in English; the same seed gives the same prompts."""
    chooser, said = random.Random(seed), {}                  # noqa: S311  # nosec B311: no secret
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
