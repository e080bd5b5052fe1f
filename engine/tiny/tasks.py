"""Seeded generator of small chat tasks with exact answers; a hash of the prompt decides train or held-out.

Arithmetic and sorting answers spell out their steps, so that every token follows from a small fact.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

from engine.tiny import words

Message = dict[str, str]
HELD_OUT_SHARE = 16

ABOUT = (
    "I can add and subtract numbers, sort lists, write small Python functions, make JSON records, tell short stories"
    " and answer simple questions."
)


@dataclass(frozen=True)
class Task:
    """One chat whose last message is the assistant answer to learn; `family` names the kind of task."""

    family: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def held_out(self) -> bool:
        digest = blake2b(json.dumps(self.prompt, sort_keys=True).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def chat(*turns: str, system: str = "") -> tuple[Message, ...]:
    """Alternating user and assistant turns, after a system message if there is one."""
    head = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return tuple(head + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)])


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def name(draw: Random) -> str:
    """A known name, now and then an invented one, so that names are copied and not only recognised."""
    if draw.random() < 0.9:
        return draw.choice(words.NAMES)
    return "".join(draw.choices(words.SYLLABLES, k=draw.choice((2, 3)))).capitalize()


# --- arithmetic ---------------------------------------------------------------------------------------------------

PLACES_OF_DIGITS = ("ones", "tens", "hundreds", "thousands")


def digits(number: int, count: int) -> list[int]:
    return [number // 10**i % 10 for i in range(count)]


def addition(left: int, right: int) -> str:
    """Column addition in words, from the ones upward."""
    count = len(str(max(left, right)))
    carry, steps = 0, []
    for i, (x, y) in enumerate(zip(digits(left, count), digits(right, count), strict=True)):
        total = x + y + carry
        carried = f" + {carry}" if i else ""
        carry = total // 10
        rest = f", write {total % 10}, carry {carry}" if i < count - 1 else ""
        steps.append(f"{PLACES_OF_DIGITS[i]} {x} + {y}{carried} = {total}{rest}")
    return f"{'; '.join(steps)}. So {left} + {right} = {left + right}."


def subtraction(left: int, right: int) -> str:
    """Column subtraction in words, from the ones upward; a borrow raises the upper digit by ten."""
    count = len(str(left))
    borrow, steps = 0, []
    for i, (x, y) in enumerate(zip(digits(left, count), digits(right, count), strict=True)):
        borrowed = f" - {borrow}" if i else ""
        total = x - y - borrow
        upper = x + 10 if total < 0 else x
        borrow = int(total < 0)
        rest = f", borrow {borrow}" if i < count - 1 else ""
        steps.append(f"{PLACES_OF_DIGITS[i]} {upper} - {y}{borrowed} = {total % 10}{rest}")
    return f"{'; '.join(steps)}. So {left} - {right} = {left - right}."


def operands(draw: Random) -> tuple[int, int]:
    low, left, right = draw.choice(
        ((1, 10, 10), (10, 100, 100), (10, 100, 100), (10, 1000, 100), (10, 1000, 1000))
    )
    return draw.randrange(low, left), draw.randrange(low, right)


def sums(draw: Random) -> tuple[Message, ...]:
    left, right = operands(draw)
    kind = draw.random()
    if kind < 0.55:
        form = draw.choice(
            ("What is {} + {}?", "{} + {}", "{} + {} = ?", "Add {} and {}.", "How much is {} plus {}?",
             "Please add {} and {}.", "Calculate {} + {}.", "What is the sum of {} and {}?")
        )  # fmt: skip
        return chat(form.format(left, right), "First the " + addition(left, right))
    if kind < 0.9:
        left, right = max(left, right), min(left, right)
        form = draw.choice(
            ("What is {} - {}?", "{} - {}", "{} - {} = ?", "Subtract {1} from {0}.", "How much is {} minus {}?",
             "Calculate {} - {}.", "Take {1} away from {0}.")
        )  # fmt: skip
        return chat(form.format(left, right), "First the " + subtraction(left, right))
    left, right = draw.randrange(1, 11), draw.randrange(1, 11)
    form = draw.choice(
        ("What is {} times {}?", "{} * {}", "{} x {}", "Multiply {} and {}.", "Calculate {} * {}.")
    )
    return chat(form.format(left, right), f"From the table: {left} * {right} = {left * right}.")


def word_problem(draw: Random) -> tuple[Message, ...]:
    who, thing = name(draw), draw.choice(words.THINGS)
    left, right = draw.randrange(10, 100), draw.randrange(10, 100)
    if draw.random() < 0.5:
        prompt, start = draw.choice(
            (
                (
                    "{who} has {left} {thing}. {who} buys {right} more. How many {thing} does {who} have now?",
                    "has",
                ),
                ("{who} had {left} {thing} and got {right} more. How many {thing} are there now?", "had"),
                (
                    "There are {left} {thing} in a box. {who} adds {right} {thing}. How many are in the box?",
                    "sees",
                ),
            )
        )
        work, result = addition(left, right), left + right
        change = "more"
    else:
        left, right = max(left, right), min(left, right)
        prompt, start = draw.choice(
            (
                ("{who} has {left} {thing}. {who} loses {right} of them. How many {thing} are left?", "has"),
                (
                    "{who} had {left} {thing} and gave away {right}. How many {thing} does {who} have now?",
                    "had",
                ),
                (
                    "There are {left} {thing} in a box. {who} takes {right} of them. How many are left?",
                    "sees",
                ),
            )
        )
        work, result = subtraction(left, right), left - right
        change = "fewer"
    answer = f"{who} {start} {left} {thing}, then {right} {change}: {work} The answer is {result} {thing}."
    return chat(prompt.format(who=who, left=left, right=right, thing=thing), answer)


# --- JSON ---------------------------------------------------------------------------------------------------------


def person(draw: Random) -> dict[str, str | int]:
    return {
        "name": name(draw),
        "age": draw.randrange(18, 90),
        "city": draw.choice(words.CITIES),
        "likes": draw.choice(words.LIKES),
    }


def change(draw: Random, record: dict[str, str | int]) -> tuple[str, dict[str, str | int]]:
    key = draw.choice(tuple(record))
    other = person(draw)[key]
    form = draw.choice(("Change the {} to {}.", "Set the {} to {}.", "Now the {} is {}."))
    return form.format(key, other), record | {key: other}


def json_record(draw: Random) -> tuple[Message, ...]:
    record = person(draw)
    text = json.dumps(record)
    kind = draw.random()
    if kind < 0.35:
        form = draw.choice(
            (
                "Make a JSON record: name {name}, age {age}, city {city}, likes {likes}.",
                "Write JSON for {name}, age {age}, from {city}, who likes {likes}.",
                "JSON please: {name}, {age}, {city}, {likes}.",
            )
        )
        return chat(form.format(**record), text)
    if kind < 0.65:
        form = draw.choice(
            (
                "Extract JSON: {name} is {age} years old, lives in {city} and likes {likes}.",
                "Turn this into JSON: {name} likes {likes}, lives in {city} and is {age} years old.",
                "As JSON: In {city} lives {name}, who is {age} and loves {likes}.",
                "Extract the fields as JSON: At {age}, {name} from {city} still enjoys {likes}.",
            )
        )
        return chat(form.format(**record), text)
    if kind < 0.85:
        request, changed = change(draw, record)
        return chat(f"{request} {text}", json.dumps(changed))
    key = draw.choice(tuple(record))
    form = draw.choice(("What is the {} in {}?", "Read the {} from {}", "Which {} does {} hold?"))
    return chat(form.format(key, text), f"The {key} is {record[key]}.")


# --- code ---------------------------------------------------------------------------------------------------------

# what it does (after "a function that"), parameter, body, docstring, default name; {n} a number
FUNCTIONS = (
    ("adds {n} to a number", "x", "x + {n}", "Return x plus {n}.", "add_{n}"),
    ("subtracts {n} from a number", "x", "x - {n}", "Return x minus {n}.", "subtract_{n}"),
    ("multiplies a number by {n}", "x", "x * {n}", "Return x times {n}.", "times_{n}"),
    ("divides a number by {n}", "x", "x / {n}", "Return x divided by {n}.", "divide_by_{n}"),
    ("checks if a number is above {n}", "x", "x > {n}", "Tell whether x is above {n}.", "above_{n}"),
    ("checks if a number is below {n}", "x", "x < {n}", "Tell whether x is below {n}.", "below_{n}"),
    ("checks if a number is divisible by {n}", "x", "x % {n} == 0", "Tell whether {n} divides x.", "divisible_by_{n}"),
    ("keeps the numbers above {n}", "items", "[x for x in items if x > {n}]", "Keep the items above {n}.", "keep_{n}"),
    ("drops the numbers above {n}", "items", "[x for x in items if x <= {n}]", "Drop the items above {n}.", "drop_{n}"),
    ("adds {n} to each number of a list", "items", "[x + {n} for x in items]", "Add {n} to each item.", "add_all_{n}"),
    ("returns the first {n} items of a list", "items", "items[:{n}]", "Return the first {n} items.", "first_{n}"),
    ("returns the last {n} items of a list", "items", "items[-{n}:]", "Return the last {n} items.", "last_{n}"),
    ("repeats a text {n} times", "text", "text * {n}", "Repeat the text {n} times.", "repeat_{n}"),
    ("counts the words longer than {n}", "text", "sum(len(word) > {n} for word in text.split())",
     "Count words longer than {n}.", "count_{n}"),
    ("returns the largest number of a list", "items", "max(items)", "Return the largest item.", "largest"),
    ("returns the smallest number of a list", "items", "min(items)", "Return the smallest item.", "smallest"),
    ("sums a list", "items", "sum(items)", "Return the sum of the items.", "total"),
    ("reverses a text", "text", "text[::-1]", "Return the text reversed.", "reverse"),
    ("counts the words of a text", "text", "len(text.split())", "Count the words of the text.", "count_words"),
    ("sorts a list", "items", "sorted(items)", "Return the items sorted.", "sort_items"),
)  # fmt: skip


def code(draw: Random) -> tuple[Message, ...]:
    does, parameter, body, doc, label = draw.choice(FUNCTIONS)
    n = draw.randrange(2, 100)
    does, body, doc, label = (part.format(n=n) for part in (does, body, doc, label))
    form = draw.choice(
        ("Write a Python function that {}.", "Write a function that {}.", "Python function that {}, please.",
         "I need a Python function that {}.", "Give me a function that {}.")
    )  # fmt: skip
    prompt = form.format(does)
    if draw.random() < 0.6:
        label = draw.choice(words.LABELS)
        prompt += draw.choice((f" Call it {label}.", f" Name it {label}."))
    source = f'def {label}({parameter}):\n    """{doc}"""\n    return {body}'
    return chat(prompt, f"```python\n{source}\n```\nThe function {label} {does}.")


# --- lists --------------------------------------------------------------------------------------------------------


def listed(items: list[int] | list[str]) -> str:
    return ", ".join(str(item) for item in items)


def sorting(items: list[int], largest: bool) -> str:
    """Repeatedly take the smallest (or the largest), spelling out what is left."""
    left, steps = list(items), []
    while left:
        chosen = max(left) if largest else min(left)
        steps.append(f"{listed(left)}: take {chosen}")
        left.remove(chosen)
    return "\n".join(steps) + f"\nSorted: {listed(sorted(items, reverse=largest))}"


def sort(draw: Random) -> tuple[Message, ...]:
    if draw.random() < 0.25:
        fruit = draw.sample(words.FRUIT, draw.choice((3, 4, 5)))
        form = draw.choice(("Sort these words: {}", "Put in alphabetical order: {}", "Sort the words {}."))
        return chat(form.format(listed(fruit)), f"In alphabetical order: {listed(sorted(fruit))}")
    numbers = draw.sample(range(10, 100), draw.choice((3, 4, 4, 5)))
    if draw.random() < 0.65:
        form = draw.choice(
            ("Sort these numbers: {}", "Sort: {}", "Please sort {}.", "Sort the list {}.",
             "Put these in order: {}", "Sort from smallest to largest: {}")
        )  # fmt: skip
        return chat(form.format(listed(numbers)), sorting(numbers, largest=False))
    form = draw.choice(
        ("Sort from largest to smallest: {}", "Sort in descending order: {}", "Largest first: {}")
    )
    return chat(form.format(listed(numbers)), sorting(numbers, largest=True))


def echo(draw: Random) -> tuple[Message, ...]:
    """Repeat a jumble of words and numbers: the plainest form of the copying that most other tasks rest on."""
    pools = (
        words.NAMES,
        words.CITIES,
        words.LIKES,
        words.THINGS,
        words.FRUIT,
        tuple(words.ANIMALS),
        words.DIGITS,
    )
    jumble = [
        str(draw.randrange(1000)) if draw.random() < 0.4 else draw.choice(draw.choice(pools))
        for _ in range(draw.randrange(2, 13))
    ]
    text = draw.choice((" ", ", ")).join(jumble)
    form = draw.choice(("Repeat: {}", "Say this: {}", "Repeat after me: {}", "Copy this text: {}", "Echo {}"))
    return chat(form.format(text), f"You said: {text}")


# --- stories ------------------------------------------------------------------------------------------------------


def tale(kind: str, animal: str, who: str, place: str) -> str:
    character, food, moves, _ = words.ANIMALS[animal]
    treasure, spot, night = words.PLACES[place]
    start = f"Once upon a time, {a(character)} {animal} named {who} lived in the {place}."
    if kind == "funny":
        return (
            f"{start} {who} wanted {food} for breakfast, but found {treasure} {spot}. "
            f'"That is not breakfast!" said {who} and {moves}. Everybody in the {place} laughed, '
            f"and {who} got some {food} after all. On the way home the {animal} sang a song about {treasure}. The end."
        )
    if kind == "bedtime":
        return (
            f"{start} When the evening came, {night}. {who} had eaten enough {food} and was very tired. "
            f"The {character} {animal} put {treasure} under the pillow, closed both eyes "
            f"and dreamed of the {place}. In the dream there was {food} for every {animal} in the world. "
            f"Good night, {who}. The end."
        )
    return (
        f"{start} Every day {who} looked for {food}. One morning {who} found {treasure} {spot}. "
        f"{who} was so happy that the {animal} {moves}. In the evening {night}, "
        f"and {who} showed it to all the friends in the {place}. "
        f"They shared {food} and told stories until the moon came up. The end."
    )


def story_request(draw: Random) -> tuple[str, str, str, str]:
    return (
        draw.choice(("", "", "funny", "bedtime")),
        draw.choice(tuple(words.ANIMALS)),
        name(draw),
        draw.choice(tuple(words.PLACES)),
    )


def story(draw: Random) -> tuple[Message, ...]:
    kind, animal, who, place = story_request(draw)
    described = f"{kind} story" if kind else draw.choice(("story", "short story"))
    form = draw.choice(
        (
            "Tell me {described} about {animal} named {who} in the {place}.",
            "Write {described} about {who}, {animal} in the {place}.",
            "I would like {described}: {animal} called {who}, in the {place}.",
            "Please tell {described} about {animal} named {who} who lives in the {place}.",
        )
    )
    prompt = form.format(described=a(described), animal=a(animal), who=who, place=place)
    return chat(prompt, tale(kind, animal, who, place))


# --- facts --------------------------------------------------------------------------------------------------------


def after(items: list[str]) -> dict[str, str]:
    return {item: items[(i + 1) % len(items)] for i, item in enumerate(items)}


# question forms, facts, answer sentence
FACTS: tuple[tuple[tuple[str, ...], dict[str, str], str], ...] = (
    (("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?", "Capital of {}?"),
     words.CAPITALS, "The capital of {} is {}."),
    (("What colour is {}?", "Which colour has {}?", "Tell me the colour of {}.", "The colour of {}?"),
     words.COLOURS, "The colour of {} is {}."),
    (("What is the opposite of {}?", "Name the opposite of {}.", "The opposite of {}?", "Opposite of {}, please."),
     words.OPPOSITES, "The opposite of {} is {}."),
    (("What does a {} say?", "Which sound does a {} make?", "How does a {} sound?", "What is the sound of a {}?"),
     words.SOUNDS, "The sound of a {} is {}."),
    (("What is a young {} called?", "How do you call a young {}?", "Name the young of a {}.", "A baby {} is called?"),
     {animal: facts[3] for animal, facts in words.ANIMALS.items()}, "A young {} is called {}."),
    (("Which day comes after {}?", "What day follows {}?", "The day after {}?", "Name the day after {}."),
     after(words.DAYS), "The day after {} is {}."),
    (("Which month comes after {}?", "What month follows {}?", "The month after {}?", "Name the month after {}."),
     after(words.MONTHS), "The month after {} is {}."),
    (("How do you write {} in words?", "Spell the number {}.", "Write {} as a word.", "The number {} in words?"),
     {str(i): word for i, word in enumerate(words.DIGITS)}, "The number {} is written {}."),
)  # fmt: skip
POLITE = ("", "", "", "Please tell me: ", "Quick question: ", "I wonder: ", "Hello! ", "Hi, ")


def fact(draw: Random) -> tuple[str, str, str]:
    """A question, its answer as a sentence, and the bare answer."""
    forms, facts, sentence = draw.choice(FACTS)
    subject = draw.choice(tuple(facts))
    return draw.choice(forms).format(subject), sentence.format(subject, facts[subject]), facts[subject]


def facts(draw: Random) -> tuple[Message, ...]:
    question, sentence, _ = fact(draw)
    return chat(draw.choice(POLITE) + question, sentence)


# --- system prompts -----------------------------------------------------------------------------------------------


def system_prompt(draw: Random) -> tuple[Message, ...]:
    question, sentence, bare = fact(draw)
    kind = draw.randrange(7)
    if kind == 0:
        system = draw.choice(
            ("Answer in upper case.", "Use capital letters only.", "Always write in upper case.")
        )
        return chat(question, sentence.upper(), system=system)
    if kind == 1:
        system = draw.choice(
            ("Answer in lower case.", "Use small letters only.", "Always write in lower case.")
        )
        return chat(question, sentence.lower(), system=system)
    if kind == 2:
        who = name(draw)
        system = draw.choice(
            (f"You are called {who}.", f"Your name is {who}.", f"You are {who}, an assistant.")
        )
        asks = draw.choice(
            ("Who are you?", "What is your name?", "What are you called?", "Introduce yourself.")
        )
        return chat(asks, f"I am {who}, a tiny demo model. {ABOUT}", system=system)
    if kind == 3:
        word = draw.choice(("Bye", "Cheers", "Thanks", "Done", "Over", name(draw)))
        system = draw.choice((f'End every answer with "{word}!"', f'Finish each answer with "{word}!"'))
        return chat(question, f"{sentence} {word}!", system=system)
    if kind == 4:
        system = draw.choice(("Answer in one word.", "Give only the answer.", "Be brief: just the answer."))
        return chat(question, bare, system=system)
    if kind == 5:
        system = draw.choice(("Answer as JSON.", "Reply with JSON only.", "Use JSON for your answer."))
        return chat(question, json.dumps({"question": question, "answer": bare}), system=system)
    system = draw.choice(("Talk like a pirate.", "You are a pirate.", "Answer like a pirate."))
    return chat(question, f"Arr! {sentence} Now let us sail on, my friend!", system=system)


# --- two turns ----------------------------------------------------------------------------------------------------


def memory(draw: Random) -> tuple[Message, ...]:
    who = person(draw)
    first = "My name is {name}, I live in {city} and I like {likes}.".format(**who)
    hello = "Nice to meet you, {name}! I hope you can enjoy {likes} in {city}.".format(**who)
    asks, answer = draw.choice(
        (
            ("What is my name?", "Your name is {name}."),
            ("Where do I live?", "You live in {city}."),
            ("What do I like?", "You like {likes}."),
            ("What do you know about me?", "Your name is {name}, you live in {city} and you like {likes}."),
            ("Write that as JSON.", '{{"name": "{name}", "city": "{city}", "likes": "{likes}"}}'),
        )
    )
    return chat(first, hello, asks, answer.format(**who))


def two_turns(draw: Random) -> tuple[Message, ...]:
    kind = draw.randrange(6)
    if kind == 0:
        return memory(draw)
    if kind == 1:
        left, right, more = draw.randrange(10, 90), draw.randrange(10, 90), draw.randrange(10, 100)
        asks = draw.choice(("Now add {}.", "Add {} to that.", "And {} more?")).format(more)
        first = "First the " + addition(left, right)
        return chat(f"What is {left} + {right}?", first, asks, "First the " + addition(left + right, more))
    if kind == 2:
        numbers = draw.sample(range(10, 100), draw.choice((3, 4)))
        asks = draw.choice(
            ("Now the other way round.", "Now from largest to smallest.", "Reverse that, please.")
        )
        answer = f"The other way round: {listed(sorted(numbers, reverse=True))}"
        return chat(f"Sort these numbers: {listed(numbers)}", sorting(numbers, largest=False), asks, answer)
    if kind == 3:
        forms, known, sentence = draw.choice(FACTS)
        one, two = draw.sample(tuple(known), 2)
        asks = draw.choice(("And {}?", "What about {}?", "And now {}, please.")).format(two)
        return chat(
            draw.choice(forms).format(one),
            sentence.format(one, known[one]),
            asks,
            sentence.format(two, known[two]),
        )
    if kind == 4:
        record = person(draw)
        request, changed = change(draw, record)
        prompt = "Make a JSON record: name {name}, age {age}, city {city}, likes {likes}.".format(**record)
        return chat(prompt, json.dumps(record), request, json.dumps(changed))
    story_kind, animal, who, place = story_request(draw)
    described = a(f"{story_kind} story" if story_kind else "story")
    treasure, spot, _ = words.PLACES[place]
    asks, answer = draw.choice(
        (
            ("What was the name?", f"The {animal} was named {who}."),
            ("Where did that happen?", f"It happened in the {place}."),
            ("Which animal was it?", f"It was {a(animal)} named {who}."),
            ("What did the animal eat?", f"The {animal} liked {words.ANIMALS[animal][1]}."),
        )
    )
    first = f"Tell me {described} about {a(animal)} named {who} in the {place}."
    return chat(first, tale(story_kind, animal, who, place), asks, answer)


# --- small talk ---------------------------------------------------------------------------------------------------

GREETINGS = (
    "Hello",
    "Hi",
    "Hey",
    "Good morning",
    "Good evening",
    "Hi there",
    "Hello there",
    "hello",
    "hi",
    "hey",
)
TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Who are you", "What are you", "Tell me about yourself", "Introduce yourself", "who are you", "what are you",
      "Are you a language model", "What is this", "What model is this", "What is your name"),
     f"I am the tiny demo model of TriServe, a very small language model. {ABOUT}"),
    (("What can you do", "what can you do", "Help", "help", "How can you help me", "What can I ask", "What do you know",
      "Can you help me", "What should I ask you", "Give me some examples"),
     f"{ABOUT} For example: What is 47 + 38?"),
    (("How are you", "how are you", "How do you do", "How is it going", "What's up", "Are you well"),
     "I am fine, thank you! What can I do for you?"),
    (("Thank you", "Thanks", "thanks", "Thank you very much", "Many thanks", "Great, thanks", "Well done", "Good job"),
     "You are welcome! Ask me something else if you like."),
    (("Bye", "Goodbye", "bye", "See you", "Good night", "See you later"), "Goodbye! Come back soon."),
    (("Tell me a joke", "Make me laugh", "Do you know a joke", "tell me a joke", "A joke, please"),
     "Why did the tiny model cross the road? It had too few parameters to go around. That was my only joke."),
    (("What modes do you have", "How do you work", "How do you write text", "What is diffusion"),
     "I can write word by word, denoise a whole block at once, or draft a block and then verify it."),
    (("Test", "test", "Testing", "ping", "Are you there", "Is this working"), "Yes, I am here and working."),
    (("Tell me a story", "tell me a story", "Write a story", "A story, please", "Can you tell me a story"),
     tale("", "fox", "Mia", "forest")),
)  # fmt: skip
UNKNOWN_FORMS = (
    "Tell me about {}.", "Explain {}.", "What do you think about {}?", "Write an essay about {}.", "What is {}?",
    "Write a poem about {}.", "Help me with {}.", "How does {} work?", "Can you explain {}?", "Give me advice on {}.",
    "Summarise {}.", "Why is {} important?", "explain {}", "I want to know more about {}.", "Let us talk about {}.",
)  # fmt: skip


def small_talk(draw: Random) -> tuple[Message, ...]:
    kind = draw.random()
    if kind < 0.2:
        greeting = draw.choice(GREETINGS)
        tail = draw.choice(
            ("", "!", ".", ", nice to meet you.", ", how are you?", " model!", ", can you hear me?")
        )
        return chat(greeting + tail, f"Hello! I am the tiny demo model of TriServe. {ABOUT}")
    if kind < 0.75:
        asks, answer = draw.choice(TALK)
        head = draw.choice(("", "", "", "Hello! ", "Hi, ", "Please: ", "So, ", "OK. "))
        return chat(
            head + draw.choice(asks) + draw.choice(("", "?", "!", ".", "??", " please", "...")), answer
        )
    topic = draw.choice(words.UNKNOWN_TOPICS)
    answer = f"I am only a tiny model and know nothing about {topic}. {ABOUT}"
    return chat(draw.choice(UNKNOWN_FORMS).format(topic), answer)


# family: (its generator, how often it is drawn)
FAMILIES: dict[str, tuple[Callable[[Random], tuple[Message, ...]], int]] = {
    "sum": (sums, 16),
    "word problem": (word_problem, 12),
    "json": (json_record, 12),
    "code": (code, 11),
    "sort": (sort, 13),
    "echo": (echo, 6),
    "story": (story, 10),
    "fact": (facts, 7),
    "system": (system_prompt, 9),
    "two turns": (two_turns, 12),
    "small talk": (small_talk, 6),
}


def draw_task(draw: Random, held_out: bool, family: str | None = None) -> Task:
    """The next task of the wanted split, of a random family unless one is named."""
    while True:
        chosen = family or draw.choices(list(FAMILIES), [weight for _, weight in FAMILIES.values()])[0]
        task = Task(chosen, FAMILIES[chosen][0](draw))
        if task.held_out == held_out:
            return task


def evaluation_tasks(count: int, seed: int = 1) -> list[Task]:
    """`count` held-out tasks, the families in turn."""
    draw = Random(f"evaluation {seed}")
    names = list(FAMILIES)
    return [draw_task(draw, held_out=True, family=names[i % len(names)]) for i in range(count)]
