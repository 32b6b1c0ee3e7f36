"""The page of several models: the Pareto plot, measures side by side, differences, prompts, completions by answer."""

import pathlib
from collections.abc import Sequence
from typing import Any

from mara_jax.evaluate import models, page
from mara_jax.evaluate.models import Difference, Model

_BODY = """<p>{{ prompts|length }} prompts of {{ settings.prompts }}, {{ settings.samples }} completions each by every
model. A completion is good from a reward of {{ settings.threshold }} on.</p>
<img alt="Mean reward against {{ diversity }} of each model, with 95 % intervals; the Pareto-best ones are connected."
  src="data:image/png;base64,{{ picture }}">
<p>Pareto-best of reward and {{ diversity }}: {{ front|join(", ") }}.</p>
<h2>Means over the prompts</h2>
<div class="wide"><table>
<tr><th class="text">measure</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for measure, cells in means %}
<tr><td class="text">{{ measure }}</td>{% for cell in cells %}<td>{{ cell.mean }}{% if cell.interval %}<br>
<span class="quiet">{{ cell.interval }}</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if rules %}<p class="quiet">{{ rules }}.</p>
{% endif %}
{% if verdicts %}
<h2>Differences from {{ names[0] }}</h2>
{% for line in verdicts %}<p>{{ line }}</p>
{% endfor %}
<div class="wide"><table>
<tr>{% for name in compared.header[:1] + compared.header[2:] %}<th{% if loop.first %} class="text"{% endif
  %}>{{ name }}</th>{% endfor %}</tr>
{% for row in compared.rows %}
<tr><td class="text">{{ row[0] }}</td>{% for cell in row[2:] %}<td>{% if "*" in cell %}<strong>{{ cell }}</strong>{%
  else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="quiet">{{ compared.note }}.</p>
{% endif %}
<h2>Prompts</h2>
<div class="wide"><table>
<tr><th class="text" rowspan="2">prompt</th>{% for measure in columns %}<th colspan="{{ names|length }}">{{ measure
  }}</th>{% endfor %}</tr>
<tr>{% for measure in columns %}{% for name in names %}<th>{{ name }}</th>{% endfor %}{% endfor %}</tr>
{% for one in prompts %}
<tr><td class="text"><a href="#prompt-{{ one.number }}">{{ one.title }}</a></td>
{% for measure in columns %}{% for row in one.rows %}<td>{{ "%.3f"|format(row[measure]) }}</td>{% endfor %}
{% endfor %}</tr>
{% endfor %}
</table></div>
<h2>Answers and completions</h2>
{% for one in prompts %}
<details id="prompt-{{ one.number }}"{% if loop.first %} open{% endif %}>
<summary>{{ one.title }} <span class="quiet">{{ one.answers|length }} different answers</span></summary>
<pre>
{{ one.prompt }}</pre>
<div class="wide"><table>
<tr><th class="text">answer</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for answer, counts in one.answers %}
<tr><td class="text">{{ answer }}</td>{% for count in counts %}<td>{{ count or "" }}</td>{% endfor %}</tr>
{% endfor %}
{% if one.left_out %}<tr><td class="text quiet">and {{ one.left_out }} more</td></tr>
{% endif %}
</table></div>
{% for name, answers in one.completions %}
<details><summary>completions of {{ name }}</summary>
{{ completions(answers, settings.samples) }}
</details>
{% endfor %}
</details>
{% endfor %}
</body>
</html>
"""
MOST_ANSWERS = 40  # of a prompt, in the table of answers


def write(path: pathlib.Path, evaluated: Sequence[Model], rows: Sequence[Difference], picture: pathlib.Path) -> None:
    """Writes one file that needs no other.

    Args:
      evaluated: on the same prompts; rows: their differences, none where there are too few prompts; picture: a PNG.
    """
    text = page.rendered(
        _BODY,
        title="Evaluation of " + ", ".join(one.name for one in evaluated),
        settings=evaluated[0].result["settings"],
        names=[one.name for one in evaluated],
        rules=page.rules(evaluated[0].result.get("texts")),
        diversity=models.diversity_of(evaluated),
        front=models.front(evaluated),
        means=[(measure, _cells(evaluated, measure)) for measure in evaluated[0].result["metrics"]],
        verdicts=models.verdicts(evaluated, rows) if rows else [],
        compared=models.compared(evaluated, rows) if rows else None,
        columns=[models.QUALITY, models.diversity_of(evaluated)],
        prompts=[_prompt(evaluated, place) for place in range(len(evaluated[0].result["prompts"]))],
        picture=page.as_base64(picture),
    )
    path.write_text(text, encoding="utf-8", errors="replace")


def _cells(evaluated: Sequence[Model], measure: str) -> list[dict[str, str]]:
    """A measure of each model, with its interval; "-" where it has none."""
    cells = []
    for one in evaluated:
        value, interval = one.result["metrics"].get(measure), one.result["intervals"].get(measure)
        mean = "-" if value is None else f"{value:.3f}"
        cells.append({"mean": mean, "interval": "" if interval is None else "{:.3f} to {:.3f}".format(*interval)})
    return cells


def _prompt(evaluated: Sequence[Model], place: int) -> dict[str, Any]:
    """What the page shows of one prompt."""
    rows = [one.result["prompts"][place] for one in evaluated]
    counts = [row["counts"] for row in rows]
    total = {answer: sum(one.get(answer, 0) for one in counts) for of in counts for answer in of}
    answers = sorted(total, key=lambda answer: -total[answer])
    return {
        "number": rows[0]["prompt_id"],
        "title": page.title(rows[0]["prompt"]),
        "prompt": page.cut(rows[0]["prompt"]),
        "rows": rows,
        "answers": [(answer, [one.get(answer, 0) for one in counts]) for answer in answers[:MOST_ANSWERS]],
        "left_out": max(0, len(answers) - MOST_ANSWERS),
        "completions": [(one.name, page.by_answer(one.groups[place])) for one in evaluated if one.groups is not None],
    }
