"""A prompt -> whether its words contradict each other: snow in June, a bearded girl, rain from a clear sky."""

from .english import american, words_of

CHILD = """toddler; toddlers; baby; child; children; girl; girls; boy; boys; schoolgirl; schoolboy; twin; twins; newborn; schoolchild; schoolchildren"""
WOMAN = """woman; women; girl; girls; grandmother; grandmothers; mother; mothers; nun; nuns; bride; brides; ballerina; ballerinas; waitress; waitresses; queen; queens;
princess; princesses; milkmaid; seamstress; bridesmaid; bridesmaids; geisha; noblewoman; flapper; flappers; housewife; priestess; governess"""
MAN = "man; men; boy; boys; grandfather; grandfathers; father; fathers; monk; monks; groom; grooms; king; kings; sultan; sultans; priest; imam; rabbi; pope"
SNOW = "snow; snowy; snowfall; snowstorm; snow-dusted; winter; frost; frosty; icicles; blizzard; snow-laden; snow-covered; snowflake; snowflakes; snowy twig"
WARM = """summer; june; heat; hot; spring; autumn; blossom; blossoming; bloom; blooming; butterflies; butterfly; bees; bee; lavender; poppies; tulips; sunflowers; sunflower;
dragonflies; dragonfly; lilies; berries; palms; palm; tropical; flowers; picnic; beach; ripe; tomatoes; swimmer; swimmers; parasol; roses; petals; wheat; bumblebees"""
AUTUMN = "autumn; november; fallen leaves"
NOT_AUTUMN = "summer; june; spring; blossom; blossoming; bluebells; tulips; poppies; daffodils; snow; snowy; winter"
CLEAR = """clear sky; clear blue; sky is; cloudless; bright sun; sunshine; midday sun; blue sky; hard sunlight; starry; sun stands; bright midday; hazy sunshine; stars are; milky; sunbeams; full moon; moonlight"""
CLOUDY = """rain; raining; rainy; rain-soaked; drizzle; overcast; fog; foggy; mist; misty; storm; stormy; thunderstorm; clouds; cloud; snowfall; falling snow; downpour; puddles; rainbow; blizzard; hail"""
NIGHT = """night; midnight; moonlight; starlight; starry; full moon; first stars; polar night; street lamps; street lamp; headlights; milky; candlelight; lamplight; torchlight; floodlights; dark outside; tail lights; glow-worms; meteor; aurora"""
DAY = """midday; noon; sunlight; sunshine; sunny; sunbeams; sunbeam; morning; dawn; sunrise; afternoon; daylight; blue sky; sunlit; golden hour; sunset; rainbow; dappled; blue hour; skylight; evening sun; white clouds; golden light; hazy sun; low sun; bright sun; overcast"""
MORNING = "dawn; sunrise; morning"
EVENING = "evening; sunset; dusk; afternoon; midday; noon; just set; last light; last rays; blue hour; november; twilight; nightfall; midnight; first stars; night; moonlight; moon"
NOON = "midday; noon; sun stands"
LOW_SUN = "evening; sunset; dusk; low sun; long shadows; last light; last rays; fog; mist; golden hour; twilight; stars; dawn; pink sky; sky glows; just set; orange"
CLOSE = "close-up; macro; extreme close; close view; head and; tight framing; cropped tightly; tight crop"
WIDE = """wide shot; far away; aerial; distant view; panoramic; drone; bird's-eye; whole scene; to foot; slight distance; wide frame; wide-angle; high above; establishing; empty space; full-length; full body; full shot; far below; distance; wide underwater; fleet; panorama"""
LOW = "low angle; from below; worm's-eye; low-angle; the ground; up from; horizon"
HIGH = """from above; aerial; drone; drone's; bird's-eye; looks down; straight down; eye level; eye-level; overhead; top-down; table height; flat lay; high window; from behind; in profile; straight from"""
GREY = "monochrome; black and white; and white; sepia; shades of grey; soft greys; soft grays; warm greys; silhouette"
COLOURFUL = "vivid; saturated; natural colours; colour photo; rainbow; neon colours; orange glow; pink and; colours are; bright colours; candy colours; glowing colours; teal and; golden light"
BLURRED = "shallow depth; softly blurred; bokeh; blurred background; soft focus; tilt-shift; slight motion"
SHARP = "sharp from; everything in; sharp focus; fine textures; highly detailed; intricate details; crisp; f/8"
CONTRADICTIONS = (
    (CHILD, "elderly; middle-aged; grey-haired; bearded; beard; moustache; wrinkles; tattoos; tattooed; retired; experienced; skilled; pipe; white-bearded; young; veteran; tired"),
    (WOMAN, "bearded; beard; moustache; bald"),
    (MAN, "sari; bonnet; bridesmaid; sequinned dress; lace dress; skirt; dress; flower crown"),
    (SNOW, WARM),
    (AUTUMN, NOT_AUTUMN),
    (CLEAR, CLOUDY),
    (NIGHT, DAY),
    (MORNING, EVENING),
    (NOON, LOW_SUN),
    (CLOSE, WIDE),
    (LOW, HIGH),
    (GREY, COLOURFUL),
    (BLURRED, SHARP),
    ("barefoot; bare feet", "boots; shoes; sandals; socks"),
    ("old; ancient; antique; vintage; weathered", "brand-new; newly hatched; freshly built; futuristic; newborn"),
    ("tiny; small; mini; little", "giant; huge; enormous; towering; gigantic; massive"),
    ("empty; deserted; lone; lonely; abandoned", "crowd; crowded; overloaded; cheering; busy; full of"),
)


def _masks() -> dict[str, int]:
    """Return {word or two words: a bit for each side of a contradiction that has it}."""
    masks: dict[str, int] = {}
    for bit, side in enumerate(side for pair in CONTRADICTIONS for side in pair):
        for term in filter(None, map(str.strip, side.replace("\n", " ").split(";"))):
            for spelled in {term, american(term)}:
                masks[spelled] = masks.get(spelled, 0) | 1 << bit
    return masks


MASKS = _masks()
FIRST_SIDES = sum(1 << 2 * number for number in range(len(CONTRADICTIONS)))


def contradicts_itself(prompt: str) -> bool:
    """Return whether a prompt has words of both sides of a contradiction."""
    words, found = words_of(prompt), 0
    for word in words:
        found |= MASKS.get(word, 0)
    for pair in zip(words, words[1:]):
        found |= MASKS.get(" ".join(pair), 0)
    return bool(found & found >> 1 & FIRST_SIDES)
