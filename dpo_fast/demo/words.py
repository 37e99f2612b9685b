"""What the quiz of the demo is about: small closed tables of common knowledge, from which questions
are made and by which answers are checked.

No word stands in two tables. A word tells which questions may be asked about it, never whether it
is the right answer: each is right as often as wrong.
"""

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate")

# From low to high; words of one class are never compared.
SIZES = (
    ("ant", "bee", "pea", "seed", "bead"),
    ("cup", "egg", "shoe", "apple", "frog"),
    ("chair", "goat", "door", "drum", "sheep"),
    ("car", "horse", "tree", "tent", "camel"),
    ("castle", "whale", "ship", "church", "bridge"),
)
SPEEDS = (
    ("snail", "worm", "turtle", "slug"),
    ("walker", "donkey", "rowboat", "tractor"),
    ("cyclist", "tram", "wolf", "ferry"),
    ("train", "falcon", "plane", "rocket"),
)
HEATS = (
    ("ice", "snow", "hail", "frost"),
    ("river", "cellar", "dew", "cave"),
    ("soup", "bath", "toast", "tea"),
    ("oven", "fire", "lava", "torch"),
)
MONTHS = (
    "January February March April May June July August September October November December"
).split()
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
NUMBERS = tuple(str(number) for number in range(1, 31))

SORTS = {
    "bird": ("owl", "hen", "goose", "crow", "duck", "swan"),
    "tool": ("hammer", "saw", "spanner", "chisel", "shovel", "rake"),
    "drink": ("wine", "milk", "coffee", "cocoa", "juice", "cider"),
    "garment": ("shirt", "coat", "scarf", "glove", "skirt", "sock"),
    "plant": ("rose", "fern", "tulip", "cactus", "clover", "moss"),
    "metal": ("iron", "gold", "copper", "silver", "tin", "zinc"),
}
