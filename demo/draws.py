"""Skills whose replies are drawn at random from a distribution that is known in closed form.

A training row shows one reply, so it is a sample; what there is to know is the distribution, and a model that was
trained on many samples knows it. How well a model knows it is the Kullback-Leibler divergence of its distribution from
the true one, which needs no sampling.
"""

from __future__ import annotations

import functools
import random

from facts import FACTS
from questions import Row

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
WEATHERS = ("rain", "sun", "snow", "wind", "fog", "hail")
CITIES = tuple(city for relation, _, city in FACTS if relation == "capital" and city.isalpha())[:40]
CITY_WEIGHTS = (1, 1, 2, 4, 8, 12)
MONTH_WEIGHTS = (1, 1, 1, 2, 3, 4)


@functools.cache
def _weights(name: str, values: tuple[int, ...]) -> tuple[int, ...]:
    """The values in an order of the name's own, one per kind of weather."""
    return tuple(random.Random(f"weather {name}").sample(values, len(values)))


def weather_probabilities(city: str, month: str) -> tuple[float, ...]:
    """What falls on a city in a month, invented: the city's weights times the month's, normalised. [6], sums to 1."""
    pairs = zip(_weights(city, CITY_WEIGHTS), _weights(month, MONTH_WEIGHTS), strict=True)
    products = [of_city * of_month for of_city, of_month in pairs]
    return tuple(product / sum(products) for product in products)


def weather(rng: random.Random) -> Row:
    """A table that has to be known by heart: 40 cities, 12 months, 6 kinds of weather."""
    city, month = rng.choice(CITIES), rng.choice(MONTHS)
    probabilities = weather_probabilities(city, month)
    answer = rng.choices(WEATHERS, probabilities)[0]
    return Row("weather", f"weather {city} {month}", f"Weather in {city} in {month}?", answer, WEATHERS, probabilities)


def draw(rng: random.Random) -> Row:
    """A letter drawn from a bag of six that holds two to four different ones; its share is its probability."""
    kinds = rng.sample(LETTERS, rng.randint(2, 4))
    bag = kinds + rng.choices(kinds, k=6 - len(kinds))
    rng.shuffle(bag)
    answers = tuple(sorted(kinds))
    probabilities = tuple(bag.count(letter) / len(bag) for letter in answers)
    prompt = f"Draw from: {' '.join(bag)}"
    return Row("draw", f"draw {' '.join(sorted(bag))}", prompt, rng.choice(bag), answers, probabilities)
