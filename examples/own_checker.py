"""A checker of one's own: any function of the answer's text and its item, named `module:function`.

Here an answer counts when it is within one of the right number. On the command line:

    python -m diffmas.train --task items.jsonl --checker own_checker:close
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffmas import Prompts
from diffmas.answers import numbers
from diffmas.tasks.jsonl import task_of

PROMPTS = Prompts({"single": {"user": "{question}"}})


def close(text: str, item: Mapping[str, Any]) -> bool:
    said = numbers.last(text)
    return said is not None and abs(numbers.parse(said) - numbers.parse(item["answer"])) <= 1


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    items = [{"question": "How many legs has a spider?", "answer": "8"}, {"question": "2 + 2?", "answer": "4"}]
    task = task_of([], items, PROMPTS, checker="own_checker:close")
    for text in ("about 7", "it has 9 legs", "6", "no idea"):
        print(f"{text!r}: {task.check(text, items[0])}")


if __name__ == "__main__":
    main()
