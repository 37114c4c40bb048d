"""What Self-Instruct's three stages show and ask, all in our own words.

Each example is a text of its own, so that the last ones give way where the context is short.
"""

from __future__ import annotations

__all__ = ["INPUT_FIRST", "IS_CLASSIFICATION", "LIST", "OUTPUT_FIRST", "Template"]

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Template:
    """A header and the examples below it, each ended by a blank line."""

    header: str
    examples: tuple[str, ...]


LIST = """\
Below is a list of tasks of many kinds. Go on with it, one task to a number and nothing else.

"""
"""Of the first stage; the numbered tasks follow."""

_CLASSIFICATION = """\
For each task, say whether it is classification: whether every right answer to it is one of a few labels that are known beforehand. Answer with Yes or No.
"""
"""Of the second stage. It says what is meant, as chat models are literal."""
_JUDGED = (
    ("Tell whether the tone of this letter is polite or rude.", True),
    ("Write a toast for a colleague who retires.", False),
    ("Sort the headline into sport, politics, science or culture.", True),
    ("Which of the four statements contradicts the text? Give its letter.", True),
    ("Explain why bread goes stale.", False),
    ("Turn the recipe into a shopping list.", False),
    ("Is the number given below prime?", True),
    ("Translate the sign into French.", False),
    ("How could a small library find more readers?", False),
    ("Decide whether the two sentences mean the same.", True),
    ("Give the plural of the noun.", False),
    ("Find the spelling mistakes and correct them.", False),
    ("Rate the review from one star to five.", True),
    ("List the persons who are named in the report.", False),
    ("Compose four lines about a closed railway station.", False),
    ("Does the customer ask for a refund?", True),
    ("Work out how long the journey takes.", False),
    ("Shorten the paragraph to one sentence.", False),
    ("Name the part of speech of the underlined word.", True),
    ("Write a regular expression for a licence plate.", False),
    ("Plan three days in Lisbon for a family with a toddler.", False),
    ("Tell if the e-mail is spam.", True),
    ("Continue the story in the voice of the lighthouse keeper.", False),
    ("Reverse the order of the words.", False),
    ("Classify the animal as mammal, bird, reptile or fish.", True),
    ("What questions should one ask before renting a flat?", False),
    ("Who is speaking in the passage, and to whom?", False),
    ("Is the argument valid or a fallacy?", True),
    ("Convert the temperatures from Fahrenheit to Celsius.", False),
    ("Suggest a title for the essay.", False),
    ("Say which language the sentence is written in: Dutch, Danish or German.", True),
)
"""Tasks, and whether they are classification, of both kinds in no order."""
IS_CLASSIFICATION = Template(
    _CLASSIFICATION + "\n",
    tuple(
        f"Task: {task}\nIs it classification? {'Yes' if yes else 'No'}\n\n" for task, yes in _JUDGED
    ),
)

INPUT_FIRST = Template(
    """\
Write examples of each task: an input, then the output that is right for it. Several where you can, numbered. Where the task needs no input, write the output at once.

""",
    (
        """\
Task: Name the three largest moons of Saturn.
Output: Titan, Rhea and Iapetus.

""",
        """\
Task: Find all dates in the text and write them as year-month-day.
Example 1
Text: The bridge was opened on 4 May 1932 and closed for repairs on 11 November 1987.
Output: 1932-05-04, 1987-11-11
Example 2
Text: No records were kept before the fire.
Output: There are no dates.

""",
        """\
Task: Correct the grammar of the sentence.
Example 1
Sentence: Him and me was late again.
Output: He and I were late again.
Example 2
Sentence: There is less apples than yesterday.
Output: There are fewer apples than yesterday.
Example 3
Sentence: She don't know where is the key.
Output: She doesn't know where the key is.

""",
        """\
Task: Give a beginner some advice on keeping houseplants alive.
Output: Water when the top of the soil is dry, not by the calendar. Put most plants near a window but out of the noon sun. Use pots with a hole, and look under the leaves for insects once a week.

""",
        """\
Task: Turn the question into a polite request.
Example 1
Question: When do I get my money?
Output: Could you please tell me when I can expect the payment?
Example 2
Question: Why is nobody answering?
Output: Might I ask when somebody could get back to me?

""",
        """\
Task: Work out the total price.
Example 1
Purchase: 3 notebooks at 2.40 each and one pen at 1.10
Output: 3 x 2.40 = 7.20, and 7.20 + 1.10 = 8.30. The total is 8.30.
Example 2
Purchase: 12 eggs at 0.35 each, with a tenth off
Output: 12 x 0.35 = 4.20, less a tenth (0.42) is 3.78. The total is 3.78.

""",
        """\
Task: Write a function in Python that counts the vowels of a text.
Output: def count_vowels(text):
    return sum(letter in "aeiou" for letter in text.lower())

""",
        """\
Task: Summarise the message in one sentence.
Example 1
Message: Hi all, the boiler is being replaced on Thursday between nine and one, so there will be no hot water. Please leave the cellar door unlocked. Thanks, Irene
Output: The boiler is replaced on Thursday morning, so there is no hot water and the cellar must stay open.

""",
        """\
Task: Order the events by time.
Example 1
Events: the first aeroplane flight, the invention of the telegraph, the first moon landing
Output: the invention of the telegraph, the first aeroplane flight, the first moon landing

""",
        """\
Task: Invent a riddle whose answer is a shadow.
Output: I follow you by day and leave you in the dark. I have your shape but not your weight. What am I?

""",
        """\
Task: Rewrite the sentence in the passive voice.
Example 1
Sentence: The committee rejected the plan.
Output: The plan was rejected by the committee.
Example 2
Sentence: Two students had found the coin.
Output: The coin had been found by two students.

""",
        """\
Task: Explain the idiom and use it in a sentence.
Example 1
Idiom: to let the cat out of the bag
Output: It means to give a secret away by mistake. "We had planned a surprise, but Tom let the cat out of the bag."

""",
    ),
)
"""Of the third stage, for tasks that are not classification: the output follows from the input."""

OUTPUT_FIRST = Template(
    """\
For each classification task, write a class label and below it an input that belongs to this label, for one label after the other. Where the task needs no input, write the right label alone.

""",
    (
        """\
Task: Tell whether the tone of the sentence is cheerful or gloomy.
Class label: cheerful
Sentence: The sun is out, the kettle sings, and nobody has to be anywhere.
Class label: gloomy
Sentence: It has rained for a week, and even the dog has given up.

""",
        """\
Task: Is the statement about the calendar true or false?
Class label: true
Statement: February is the shortest month.
Class label: false
Statement: Every year that ends in two zeros is a leap year.

""",
        """\
Task: Sort the message of a customer into delivery, payment or product.
Class label: delivery
Message: The parcel was promised for Monday and it is Friday.
Class label: payment
Message: My card was charged twice for the same order.
Class label: product
Message: Does the lamp take ordinary bulbs?

""",
        """\
Task: Which of these is a prime number: 21, 23, 25 or 27? Answer with the number.
Class label: 23

""",
        """\
Task: Decide whether the second sentence follows from the first. Answer with follows, contradicts or open.
Class label: follows
First: All the windows of the house were broken. Second: The kitchen window was broken.
Class label: contradicts
First: Nobody came to the talk. Second: Three people heard the talk.
Class label: open
First: Ida plays the cello. Second: Ida is a good musician.

""",
        """\
Task: Name the part of speech of the word in capitals.
Class label: verb
Sentence: They WATER the beds at dusk.
Class label: noun
Sentence: The WATER was still cold.

""",
        """\
Task: Is the e-mail spam?
Class label: Yes
E-mail: You have been chosen! Confirm your account within one hour to get your prize.
Class label: No
E-mail: Attached are the minutes of Tuesday's meeting; tell me if I misquoted you.

""",
        """\
Task: Classify the animal as mammal, bird, reptile or fish.
Class label: reptile
Animal: a tortoise
Class label: mammal
Animal: a bat
Class label: fish
Animal: an eel

""",
        """\
Task: Rate from 1 to 3 how hard the question is for a child of ten.
Class label: 1
Question: How many legs have two spiders?
Class label: 3
Question: Why does ice float on water?

""",
        """\
Task: Say whether the line is prose or verse.
Class label: verse
Line: The road was long, the lamps were few, / and every hedge was hung with dew.
Class label: prose
Line: The road was long and poorly lit, and the hedges were wet.

""",
        """\
Task: Which of the two cities is larger? Answer with A or B.
Class label: A
Cities: A: Tokyo, B: Osaka
Class label: B
Cities: A: Lyon, B: Paris

""",
        """\
Task: Does the sentence state a fact or an opinion?
Class label: fact
Sentence: The museum opens at ten.
Class label: opinion
Sentence: The museum ought to open at eight.

""",
    ),
)
"""For classification: with the label first, all labels come up; after the input, models give the
commonest label again and again."""
