"""A row of every form, written by us, with the row that it is read as."""

from typing import Any, NamedTuple

ASK = {"role": "user", "content": "Name a bird."}
WREN = {"role": "assistant", "content": "A wren."}
OAK = {"role": "assistant", "content": "An oak."}
SYSTEM = {"role": "system", "content": "Be brief."}


class Golden(NamedTuple):
    """A raw row, the kind that it gives, and the row that is read."""

    raw: dict[str, Any]
    kind: str
    row: dict[str, Any]


def ranked(
    completions: list[str], scores: list[float], prompt: Any = "Name a bird."
) -> dict[str, Any]:
    """Returns a row of preferences with a prompt that is a text."""
    return {"prompt": prompt, "completions": completions, "scores": scores}


def in_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of preferences whose prompt came as messages."""
    return row | {"prompt": "User: Name a bird.", "messages": [ASK]}


PAIR = ["A wren.", "An oak."]
GOLDEN = {
    "text": Golden({"text": "A wren sings."}, "text", {"text": "A wren sings."}),
    "messages": Golden(
        {"messages": [SYSTEM, ASK, WREN]},
        "messages",
        {"messages": [SYSTEM, ASK, WREN]},
    ),
    "prompt": Golden({"prompt": "Name a bird."}, "prompt", {"messages": [ASK]}),
    "preferences": Golden(
        ranked(PAIR, [2.0, -1.0]), "preferences", ranked(PAIR, [2.0, -1.0])
    ),
    "unpaired": Golden(
        {"messages": [ASK], "response": "A wren.", "desirable": True},
        "unpaired",
        {"messages": [ASK], "response": "A wren.", "desirable": True},
    ),
    "steps": Golden(
        {"messages": [ASK], "steps": ["It sings.", "A wren."], "labels": [0, 1]},
        "steps",
        {"messages": [ASK], "steps": ["It sings.", "A wren."], "labels": [0.0, 1.0]},
    ),
    "sharegpt": Golden(
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Name a bird."},
                {"from": "gpt", "value": "A wren."},
            ]
        },
        "messages",
        {"messages": [SYSTEM, ASK, WREN]},
    ),
    "alpaca": Golden(
        {"instruction": "Translate.", "input": "un oiseau", "output": "a bird"},
        "messages",
        {
            "messages": [
                {"role": "user", "content": "Translate.\n\nun oiseau"},
                {"role": "assistant", "content": "a bird"},
            ]
        },
    ),
    "prompt_completion": Golden(
        {"prompt": "Name a bird.", "completion": "A wren."},
        "messages",
        {"messages": [ASK, WREN]},
    ),
    "pair": Golden(
        {"prompt": "Name a bird.", "chosen": "A wren.", "rejected": "An oak."},
        "preferences",
        ranked(PAIR, [1.0, 0.0]),
    ),
    "implicit_pair": Golden(
        {"chosen": [ASK, WREN], "rejected": [ASK, OAK]},
        "preferences",
        in_turns(ranked(PAIR, [1.0, 0.0])),
    ),
    "ranks": Golden(
        {
            "prompt": "Name a bird.",
            "completions": [*PAIR, "A jay."],
            "ranks": [1, 2, 1],
        },
        "preferences",
        ranked([*PAIR, "A jay."], [-1.0, -2.0, -1.0]) | {"ranks": [1, 2, 1]},
    ),
    "ranking": Golden(
        {
            "prompt": "Name a bird.",
            "completions": PAIR,
            "ranking": [2, 1],
            "labeler": "a",
        },
        "preferences",
        ranked(PAIR, [-2.0, -1.0]) | {"ranks": [2, 1], "labeler": "a"},
    ),
    "nectar": Golden(
        {
            "prompt": "\n\nHuman: Name a bird.\n\nAssistant: ",
            "answers": [
                {"answer": "A wren.", "rank": 1.0, "model": "x"},
                {"answer": "An oak.", "rank": 2.0, "model": "y"},
            ],
        },
        "preferences",
        in_turns(ranked(PAIR, [-1.0, -2.0])),
    ),
    "ultrafeedback": Golden(
        {
            "instruction": "Name a bird.",
            "completions": [
                {"response": "A wren.", "overall_score": 8.5},
                {"response": "An oak.", "overall_score": 1},
            ],
        },
        "preferences",
        ranked(PAIR, [8.5, 1.0]),
    ),
    "shp": Golden(
        {
            "history": "Name a bird.",
            "human_ref_A": "A wren.",
            "human_ref_B": "An oak.",
            "labels": 0,
            "score_A": 3,
            "score_B": 12,
        },
        "preferences",
        ranked(PAIR, [3.0, 12.0]),
    ),
    "kto": Golden(
        {"prompt": "Name a bird.", "completion": "An oak.", "label": False},
        "unpaired",
        {"messages": [ASK], "response": "An oak.", "desirable": False},
    ),
    "stepwise": Golden(
        {
            "prompt": "2 + 3 * 4?",
            "completions": ["3 * 4 = 12", "5 * 4"],
            "labels": [True, False],
        },
        "steps",
        {
            "messages": [{"role": "user", "content": "2 + 3 * 4?"}],
            "steps": ["3 * 4 = 12", "5 * 4"],
            "labels": [1.0, 0.0],
        },
    ),
    "prm800k": Golden(
        {
            "question": {"problem": "2 + 3 * 4?", "ground_truth_answer": "14"},
            "label": {
                "steps": [
                    {
                        "completions": [
                            {"text": "2 + 3 = 5", "rating": -1},
                            {"text": "3 * 4 = 12", "rating": 1},
                        ],
                        "human_completion": None,
                        "chosen_completion": 1,
                    },
                    {
                        "completions": [{"text": "12 + 2 = 13", "rating": -1}],
                        "human_completion": {"text": "12 + 2 = 14", "rating": None},
                        "chosen_completion": None,
                    },
                    {
                        "completions": [{"text": "So 15.", "rating": -1}],
                        "human_completion": None,
                        "chosen_completion": None,
                    },
                    {
                        "completions": [{"text": "Never reached.", "rating": 1}],
                        "human_completion": None,
                        "chosen_completion": 0,
                    },
                ],
                "finish_reason": "found_error",
            },
        },
        "steps",
        {
            "messages": [{"role": "user", "content": "2 + 3 * 4?"}],
            "steps": ["3 * 4 = 12", "12 + 2 = 14", "So 15."],
            "labels": [1.0, 1.0, -1.0],
        },
    ),
    "math_shepherd": Golden(
        {
            "input": "2 + 3 * 4? Step 1: 3 * 4 = 12 ки\nStep 2: 5 * 4 ки",
            "label": "2 + 3 * 4? Step 1: 3 * 4 = 12 +\nStep 2: 5 * 4 -",
        },
        "steps",
        {
            "messages": [{"role": "user", "content": "2 + 3 * 4?"}],
            "steps": ["Step 1: 3 * 4 = 12", "Step 2: 5 * 4"],
            "labels": [1.0, 0.0],
        },
    ),
}
