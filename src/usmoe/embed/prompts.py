"""What is written around a text before a model reads it: prompts, and the wrapper of an instruction."""

from __future__ import annotations

import difflib

PROMPTS: dict[str, str] = {
    "none": "{text}",
    "quoted": '"{text}"',
    "prompteol": 'This sentence : "{text}" means in one word:"',
    "style": 'In one word, describe the style of the following sentence - "{text}" :"',
    "sentiment": "In one word, describe the sentiment of the following sentence (positive, neutral, or negative) - "
    '"{text}" :',
    "tone": 'In one word, describe the tone of the following sentence - "{text}" (e.g., formal, informal, humorous, '
    "serious):",
    "intent": "In one word, describe the intent behind the following sentence (e.g., request, suggestion, command) - "
    '"{text}" :',
    "complexity": 'In one word, rate the complexity of the following sentence (simple, moderate, complex) - "{text}" :',
    "subjectivity": 'In one word, describe whether the following sentence is subjective or objective - "{text}" :',
    "language_style": "In one word, describe the language style of the following sentence (e.g., academic, "
    'conversational, literary) - "{text}" :',
    "grammar_structure": "In one word, describe the grammatical structure of the following sentence (simple, compound, "
    'complex) - "{text}" :',
}
"""The prompts of MoEE (Li and Zhou, "Your Mixture-of-Experts LLM Is Secretly an Embedding Model For Free", arXiv
2410.10814, table 2, in the wording of its code), `prompteol` being that of Jiang et al. (arXiv 2307.16645). MoEE's own
"none" puts the text in quotation marks: that is `quoted` here, and `none` is the text as it is."""


def template_of(prompt: str) -> tuple[str, str]:
    """What stands before and behind the text: of a prompt by name, or of one's own with {text} in it.

    Raises ValueError for a name that is unknown, and for a prompt without {text} or with several.
    """
    template = PROMPTS.get(prompt, prompt)
    if template.count("{text}") != 1:
        near = difflib.get_close_matches(prompt, PROMPTS, 1)
        raise ValueError(
            f"The prompt {prompt!r} is no name, and does not hold {{text}} once."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + f" Choose one of {', '.join(PROMPTS)}, or write your own, with {{text}} where the text goes."
        )
    before, after = template.split("{text}")
    return before, after


def instructed(instruction: str | None) -> str:
    """What stands before the text, inside of the prompt, for an instruction; nothing without one.

    The wrapper is the one of GritLM (arXiv 2402.09906), which MoEE and the released code of USMoE put around every
    text, also "without prompt", unless --no_instruction is given.
    """
    return "" if instruction is None else f"<|user|>\n{instruction}\n<|embed|>\n"
