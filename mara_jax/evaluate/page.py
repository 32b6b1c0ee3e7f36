"""The page that `evaluate run` writes: its measures, a table of the prompts, and the completions by their answers."""

import base64
import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from mara_jax.train.evaluation import Group

FILE = "evaluation.html"
TEXTS = 20  # different completions of an answer that are shown
LONGEST = 2000  # characters of a completion or a prompt that are shown
# Columns of the table of prompts, behind the reward and the least and largest k of pass@k and majority@k.
COLUMNS = ("valid", "answers/distinct", "answers/effective", "answers/unseen", "ngrams/ead")

# A newline behind <pre> is not shown, so that one at the beginning of a text is.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: .8rem 0 0; }
.quiet { color: #6b7280; } img { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #e5e7eb; }
td { font-variant-numeric: tabular-nums; }
th { font-weight: 600; vertical-align: bottom; }
th.text, td.text { text-align: left; overflow-wrap: anywhere; }
a { color: #0f6e84; }
details { border: 1px solid #e5e7eb; border-radius: 6px; margin: .6rem 0; padding: .4rem .8rem; }
details details { border: 0; border-top: 1px solid #e5e7eb; border-radius: 0; padding: .3rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f8; padding: .5rem .7rem; margin: .3rem 0;
  font-size: .85rem; }
.bar { display: inline-block; height: .6rem; background: #0f6e84; margin-right: .5rem; }
.none .bar { background: #9ca3af; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% macro completions(answers, samples) %}
{% for answer in answers %}
<details{% if answer.name is none %} class="none"{% endif %}>
<summary><span class="bar" style="width: {{ "%.1f"|format(12 * answer.count / samples) }}rem"></span>
{{ answer.count }} × {% if answer.name is none %}<span class="quiet">no answer</span>{% else
  %}<strong>{{ answer.name }}</strong>{% endif %} <span class="quiet">mean reward
  {{ "%.3f"|format(answer.reward) }}</span></summary>
{% for text, count in answer.texts %}
{% if count > 1 %}<span class="quiet">{{ count }} times:</span>{% endif %}
<pre>
{{ text }}</pre>
{% endfor %}
{% if answer.left_out %}<p class="quiet">and {{ answer.left_out }} more different ones</p>{% endif %}
</details>
{% endfor %}
{% endmacro %}
"""
_BODY = """<p>{{ prompts|length }} prompts of {{ settings.prompts }}, {{ settings.samples }} completions each, at most
{{ settings.max_new_tokens }} tokens long. A completion is good from a reward of {{ settings.threshold }} on.</p>
<img alt="Left: pass@k and majority@k by k. Right: mean reward against effective answers, a dot for each prompt."
  src="data:image/png;base64,{{ picture }}">
<h2>Means over the prompts</h2>
<div class="wide"><table>
<tr><th class="text">measure</th><th>mean</th>{% if intervals %}<th>95 % interval</th>{% endif %}</tr>
{% for name, value in metrics.items() %}
<tr><td class="text">{{ name }}</td><td>{{ "%.3f"|format(value) }}</td>
{% if intervals %}<td>{{ "%.3f to %.3f"|format(*intervals[name]) }}</td>{% endif %}</tr>
{% endfor %}
</table></div>
{% if intervals %}<p class="quiet">Bootstrap percentile intervals over prompts.</p>{% endif %}
{% if rules %}<p class="quiet">{{ rules }}.</p>{% endif %}
<h2>Prompts</h2>
<div class="wide"><table>
<tr><th class="text">prompt</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for one in prompts %}
<tr><td class="text"><a href="#prompt-{{ one.row.prompt_id }}">{{ one.title }}</a></td>
{% for name in columns %}<td>{{ "%.3f"|format(one.row[name]) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<h2>Completions by answer</h2>
{% for one in prompts %}
<details id="prompt-{{ one.row.prompt_id }}"{% if loop.first %} open{% endif %}>
<summary>{{ one.title }} <span class="quiet">{{ one.answers|length }} different</span></summary>
<pre>
{{ one.prompt }}</pre>
{{ completions(one.answers, settings.samples) }}
</details>
{% endfor %}
</body>
</html>
"""


class Answer(NamedTuple):
    """The completions of one prompt with the same answer; name: None for those without one; texts: the most frequent
    different ones with their counts; left_out: how many others there are."""

    name: str | None
    count: int
    reward: float
    texts: list[tuple[str, int]]
    left_out: int


def by_answer(group: Group) -> list[Answer]:
    """The completions of a prompt by their answers, frequent ones first, those without one last."""
    places: dict[str | None, list[int]] = {}
    for place, answer in enumerate(group.answer):
        places.setdefault(answer, []).append(place)
    rows = []
    for name, own in places.items():
        texts = collections.Counter(group.completions[place] for place in own).most_common()
        shown = [(cut(text), count) for text, count in texts[:TEXTS]]
        reward = float(np.mean(group.reward[own], dtype=np.float64))
        rows.append(Answer(name, len(own), reward, shown, len(texts) - len(shown)))
    return sorted(rows, key=lambda row: (row.name is None, -row.count))


def write(path: pathlib.Path, result: dict[str, Any], groups: Sequence[Group], picture: pathlib.Path) -> None:
    """Writes one file that needs no other: styles and the picture are in it, and all texts are escaped.

    Args:
      result: what evaluation.json holds; groups: the completions of its prompts; picture: a PNG.
    """
    by_k = [[name for name in result["metrics"] if name.startswith(kind)] for kind in ("pass@", "majority@")]
    ends = dict.fromkeys(name for names in by_k for name in (names[0], names[-1]))
    prompts = [
        {"row": row, "title": title(group.prompt), "prompt": cut(group.prompt), "answers": by_answer(group)}
        for row, group in zip(result["prompts"], groups, strict=True)
    ]
    text = rendered(
        _BODY,
        title=f"Evaluation of {result['settings']['weights']}",
        settings=result["settings"],
        metrics=result["metrics"],
        intervals=result["intervals"],
        rules=rules(result.get("texts")),
        prompts=prompts,
        columns=["reward", *ends, *COLUMNS],
        picture=as_base64(picture),
    )
    path.write_text(text, encoding="utf-8", errors="replace")


def rules(texts: Mapping[str, str | None] | None) -> str:
    """In words, what novelty and embeddings rest on; empty where neither was measured.

    Args:
      texts: as of `prompt_measures.extended`; None in evaluations that were made without.
    """
    known = texts or {}
    words = {"rule": "novelty/: two completions are the same by {}", "embedder": "embeddings/: of {}"}
    return "; ".join(text.format(known[name]) for name, text in words.items() if known.get(name))


def rendered(body: str, **values: Any) -> str:
    """A page: HEAD, which wants a `title`, and a body that may call its macro `completions`; values are escaped."""
    html = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return html.from_string(HEAD + body).render(**values)


def as_base64(picture: pathlib.Path) -> str:
    """The bytes of a file, as they stand in a data URL."""
    return base64.b64encode(picture.read_bytes()).decode()


def title(prompt: str) -> str:
    """A prompt as one line of at most 100 characters."""
    line = " ".join(prompt.split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def cut(text: str) -> str:
    """A text of at most LONGEST characters, and how many are left out."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST} more characters)"
