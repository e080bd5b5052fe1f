"""The small world the tasks talk about: names, places, animals and the facts the model must know."""

NAMES = (
    "Mia Tom Anna Ben Lucy Max Nora Leo Emma Sam Ida Paul Zoe Finn Clara Noah Eva Hugo Lily Otto Maya Jack Rosa Adam "
    "Ella Karl Iris Oscar Ruth Felix Sara Ivan Julia Omar Lena Peter"
).split()
SYLLABLES = (
    "ba be bo da do fi ga ka ko la li lo ma mi mo na ni no pa ra re ri ro sa si ta ti to va zu".split()
)

PLACES: dict[str, tuple[str, str, str]] = {
    # place: (what lies hidden there, where it lies, the sound of the night)
    "forest": ("a silver key", "under an old oak", "the owls called softly"),
    "desert": ("a golden ring", "behind a red rock", "the warm wind hummed"),
    "village": ("a blue kite", "on the church roof", "the bells rang slowly"),
    "city": ("a lost letter", "beside the fountain", "the trams rolled home"),
    "mountains": ("a shiny crystal", "inside a deep cave", "the snow fell quietly"),
    "garden": ("a tiny door", "among the roses", "the crickets sang"),
    "castle": ("a dusty crown", "below the stone stairs", "the flags moved gently"),
    "harbour": ("a green bottle", "between two boats", "the waves whispered"),
    "jungle": ("a wooden drum", "near the waterfall", "the frogs sang loudly"),
    "farm": ("a brass bell", "in the hay", "the cows slept"),
}
ANIMALS: dict[str, tuple[str, str, str, str]] = {
    # animal: (character, favourite food, how it moves, its young)
    "fox": ("clever", "berries", "danced in circles", "cub"),
    "bear": ("strong", "honey", "rolled over twice", "cub"),
    "cat": ("curious", "fish", "jumped very high", "kitten"),
    "dog": ("loyal", "bones", "ran in circles", "puppy"),
    "owl": ("wise", "seeds", "flew over the trees", "owlet"),
    "rabbit": ("quick", "carrots", "hopped all day", "kit"),
    "horse": ("proud", "apples", "galloped away", "foal"),
    "mouse": ("small", "cheese", "squeaked with joy", "pup"),
    "frog": ("cheerful", "flies", "leaped three times", "tadpole"),
    "duck": ("funny", "bread", "splashed around", "duckling"),
    "lion": ("brave", "meat", "roared with joy", "cub"),
    "sheep": ("gentle", "grass", "skipped around", "lamb"),
}

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Norway": "Oslo", "Japan": "Tokyo", "Egypt": "Cairo",
    "Greece": "Athens", "Austria": "Vienna", "Germany": "Berlin", "Portugal": "Lisbon", "Poland": "Warsaw",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Cuba": "Havana",
    "Kenya": "Nairobi", "Peru": "Lima", "Canada": "Ottawa", "China": "Beijing", "India": "New Delhi",
    "Hungary": "Budapest", "Belgium": "Brussels", "England": "London",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "blood": "red", "a banana": "yellow",
    "a carrot": "orange", "an elephant": "grey", "chocolate": "brown", "a tomato": "red", "milk": "white",
    "a lemon": "yellow", "a plum": "purple", "a flamingo": "pink", "the sun": "yellow", "a raven": "black",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "fast": "slow", "light": "dark", "happy": "sad", "old": "young",
    "full": "empty", "hard": "soft", "early": "late", "rich": "poor", "open": "closed", "strong": "weak",
    "wet": "dry", "near": "far", "loud": "quiet", "clean": "dirty", "high": "low", "left": "right", "day": "night",
}  # fmt: skip
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar", "frog": "croak",
    "mouse": "squeak", "owl": "hoot", "horse": "neigh",
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
DIGITS = "zero one two three four five six seven eight nine ten eleven twelve".split()

CITIES = [city for city in CAPITALS.values() if " " not in city]
LIKES = "tea chess music tennis books coffee trains football painting cooking cycling dancing gardens films".split()
THINGS = "apples books coins stamps marbles shells pencils cards stickers eggs tickets flowers".split()
FRUIT = "apple banana cherry date fig grape kiwi lemon mango nut orange peach quince radish tomato".split()
LABELS = "helper compute solve work task run step apply handle do_it my_function f".split()

UNKNOWN_TOPICS = (
    "quantum physics|the stock market|climate change|the weather today|football results|a good recipe|black holes|"
    "love|the meaning of life|my homework|history|politics|rockets|cars|movies|medicine|the news|philosophy|"
    "my garden|computers|the internet|neural networks|Shakespeare|a holiday trip|my job|pizza|dinosaurs|music theory|"
    "space travel|the ocean|bitcoin|robots|religion|fashion|mathematics|poetry|art|economics|chemistry|biology"
).split("|")
