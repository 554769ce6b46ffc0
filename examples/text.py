"""Sorts sentences into topics of which it has seen three sentences each, on the vectors of a small text model.

Any function from a list of strings to vectors does: `SentenceTransformer(...).encode` is the usual one. Here it is
wordllama, static vectors of 19 MB that its package ships (`pip install wordllama`, MIT licence): no download, no GPU.
The topics of training are others than those of the test.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

from ibaml import MetaLearner

NUM_KNOWN = 3
TOPICS = {
    "cooking": "oven bread soup salt butter onion recipe frying",
    "weather": "rain storm clouds snow thunder breeze frost sunshine",
    "banking": "loan account interest cheque deposit mortgage credit savings",
    "health": "fever doctor vaccine headache surgery medicine nurse allergy",
    "football": "goal striker penalty referee league stadium coach midfielder",
    "travel": "airport passport hotel luggage flight visa tourist ferry",
    "music": "guitar concert melody drummer orchestra album singer violin",
    "gardening": "seeds soil roses weeds lawn pruning compost tulips",
    "school": "homework teacher exam classroom pupils grades lesson blackboard",
    "computers": "keyboard software laptop server password browser memory printer",
    "law": "court judge lawyer verdict contract witness trial jury",
    "cars": "engine brakes tyres gearbox petrol garage clutch headlights",
    "animals": "puppy kitten horse feathers zoo wolf hamster paws",
    "clothes": "shirt trousers jacket wool sleeves shoes dress scarf",
    "space": "planet rocket orbit telescope astronaut galaxy comet moon",
    "housing": "tenant rent landlord kitchen apartment lease roof basement",
}


def sentences(topic: str) -> list[str]:
    """Sentences about a topic."""
    return [f"about {one} and {other}" for one, other in itertools.combinations(TOPICS[topic].split(), 2)]


def make_task(topics: list[str], rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Twelve sentences of each topic, and which topic each is of."""
    texts = [str(text) for topic in topics for text in rng.choice(sentences(topic), 12, replace=False)]
    return texts, np.repeat(topics, 12)


def wordllama():
    """The encoder, from the files of its package alone."""
    import wordllama

    # Without the folder it would look for its tokenizer on the web.
    shipped = Path(wordllama.__file__).parent
    return wordllama.WordLlama.load(cache_dir=shipped, disable_download=True).embed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="meta-steps of training (default: the library's)")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    names = list(TOPICS)
    train = [make_task(list(rng.choice(names[:-5], 3, replace=False)), rng) for _ in range(40)]

    learner = MetaLearner(backbone=wordllama(), classes="per_task", seed=0)
    learner.fit(train, 0.2, num_steps=options.steps)

    texts, topics = make_task(names[-5:], rng)  # five topics, where training had three at a time
    is_known = np.arange(len(texts)) % 12 < NUM_KNOWN
    posterior = learner.adapt([text for text, known in zip(texts, is_known, strict=True) if known], topics[is_known])
    asked = [text for text, known in zip(texts, is_known, strict=True) if not known]
    prediction = posterior.predict(asked)
    right = prediction.labels == topics[~is_known]
    print(f"5 new topics, {NUM_KNOWN} sentences of each known: {right.mean():.0%} of {len(asked)} others are right")
    print(f"mean confidence {prediction.confidence.mean():.2f}\nThe least sure answers:")
    for index in prediction.confidence.argsort()[:3]:
        print(f"  {asked[index]!r}: {prediction.labels[index]} ({prediction.confidence[index]:.2f})")


if __name__ == "__main__":
    main()
