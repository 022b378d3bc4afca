"""Writes data/rlhf/: the instruction, preference and prompt files of `colossal rlhf`.

    python xtask/data/make_rlhf.py

A small world: people, topics, days, and five kinds of short notes. Demonstrations vary in quality
on purpose, so that fine-tuning alone gives a mediocre writer; preferences say what is better. The
held-out prompts are combinations of (kind, name, topic, day) that occur nowhere else, of words
that do.
"""
import itertools
import json
import os
import random

OUT = os.path.join(os.path.dirname(__file__), "../../data/rlhf")
R = random.Random(20260101)
NAMES = ["Mara", "Tom", "Ines", "Paul", "Nora", "Luis", "Anna", "Omar", "Vera", "Kofi", "Lena", "Ravi"]
TOPICS = ["picnic", "concert", "dinner", "meeting", "lesson", "game", "walk", "market", "party", "trip"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
KINDS = {
    "invite": ("Invite {n} to the {t} on {d}.", ["please come to the {t} on {d}."]),
    "remind": ("Remind {n} about the {t} on {d}.", ["please remember the {t} on {d}."]),
    "thank": ("Thank {n} for the {t} on {d}.", ["the {t} on {d} was lovely."]),
    "apologise": ("Apologise to {n} for missing the {t} on {d}.", ["I am sorry that I missed the {t} on {d}."]),
    "ask": ("Ask {n} what to bring to the {t} on {d}.", ["what shall I bring to the {t} on {d}?"]),
}
CLOSINGS = ["Thank you and best wishes.", "Thank you and see you soon."]


def good(kind, n, t, d):
    body = KINDS[kind][1][0].format(n=n, t=t, d=d)
    return f"Dear {n}, {body} {R.choice(CLOSINGS)}"


def bad(kind, n, t, d):
    body = KINDS[kind][1][0].format(n=n, t=t, d=d)
    other_n = R.choice([x for x in NAMES if x != n])
    other_t = R.choice([x for x in TOPICS if x != t])
    other_d = R.choice([x for x in DAYS if x != d])
    how = R.randrange(6)
    if how == 0:
        return f"{n}, {body}"
    if how == 1:
        return f"Hey. {body[0].upper()}{body[1:]}"
    if how == 2:
        return f"Dear {n}, {KINDS[kind][1][0].format(n=n, t=other_t, d=d)}"
    if how == 3:
        return f"Dear {other_n}, {KINDS[kind][1][0].format(n=n, t=t, d=other_d)} {R.choice(CLOSINGS)}"
    if how == 4:
        return f"Dear {n}, {body} {body[0].upper()}{body[1:]} {body[0].upper()}{body[1:]}"
    return f"{other_n}, the {t}. Whatever."


def prompt(kind, n, t, d):
    return KINDS[kind][0].format(n=n, t=t, d=d)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def write(name, rows):
    with open(os.path.join(OUT, name), "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    print(name, len(rows))


combos = list(itertools.product(KINDS, NAMES, TOPICS, DAYS))
R.shuffle(combos)
sft, held_sft, pairs, held_pairs, prompts, held_prompts = (
    [combos.pop() for _ in range(n)] for n in (600, 40, 500, 80, 240, 48))
write_sft = lambda cs: [{"messages": user(prompt(*c)) + assistant((good if R.random() < 0.45 else bad)(*c))} for c in cs]
write_pairs = lambda cs: [{"prompt": user(prompt(*c)), "chosen": assistant(good(*c)), "rejected": assistant(bad(*c))} for c in cs]
write_prompts = lambda cs: [{"prompt": user(prompt(*c))} for c in cs]
os.makedirs(OUT, exist_ok=True)
write("sft.jsonl", write_sft(sft))
write("sft.heldout.jsonl", write_sft(held_sft))
write("preferences.jsonl", write_pairs(pairs))
write("preferences.heldout.jsonl", write_pairs(held_pairs))
write("prompts.jsonl", write_prompts(prompts))
write("prompts.heldout.jsonl", write_prompts(held_prompts))
