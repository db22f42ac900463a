"""The template of a run's report."""

TEMPLATE = """\
{% extends "base" %}
{% from "macros" import long_table %}

{% macro bytes(number) %}
<data value="{{ number }}" title="{{ number | exact }} bytes">{{ number | megabytes }}</data>
{%- endmacro %}

{% macro seen(sample) %}
<article><header><span>round {{ sample.round }}</span><span>
{%- if sample.loss is not none %}loss {{ "%.2f" | format(sample.loss) }}{% endif %}</span></header>
<p class="sample"><bdi>{{ sample.text }}</bdi></p></article>
{% endmacro %}

{% macro table_of(rows) %}
<div class="scroll"><table><tbody>
{% for name, value in rows %}
<tr><th scope="row">{{ name | label }}</th><td class="words">{{ value | sentence }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}

{% macro setting(row) %}
<tr{% if row.changed %} class="changed"{% endif %}><td><code>{{ row.key | label }}</code></td>
<td class="words">{{ row.value | sentence }}</td><td class="soft">{{ row.default | sentence }}</td></tr>
{% endmacro %}

{% block content %}
<header>
<p class="eyebrow">nanogpt-flower · report of a run</p>
<div class="title"><h1><bdi>{{ name | label }}</bdi></h1>
<span class="state {{ state }}">{{ state_words }}</span></div>
<p class="facts">{% for fact in facts %}<span>{{ fact | label }}</span>{% endfor %}</p>
<nav aria-label="Sections">
<a href="#loss">Loss</a><a href="#samples">Samples</a><a href="#parts">Who holds what</a>
<a href="#traffic">Traffic</a><a href="#time">Time</a><a href="#left-out">Left out</a>
<a href="#settings">Settings</a>
</nav>
{% if message %}<p class="alert">The run failed: {{ message | sentence }}</p>{% endif %}
<p class="lead">{{ comparison | join(" ") }}</p>
<dl class="cards">
{% for card in cards %}
<div><dt>{{ card.name }}</dt><dd class="figure">{{ card.figure }}</dd>
<dd class="under">{{ card.under }}</dd></div>
{% endfor %}
</dl>
</header>

<section id="loss">
<h2>Loss</h2>
<div class="pair">
<div><h3>By round</h3>{{ loss_by_round }}</div>
{% if loss_by_tokens %}<div><h3>By tokens</h3>{{ loss_by_tokens }}</div>{% endif %}
</div>
{% for note in loss_notes %}<p class="note">{{ note }}</p>{% endfor %}
{% call long_table(rounds | length, "The losses of all %d rounds" | format(rounds | length)) %}
<thead><tr><th scope="col" class="number">round</th><th scope="col" class="number">training</th>
<th scope="col" class="number">server's validation</th>
<th scope="col" class="number">clients' validation</th>
<th scope="col" class="number">perplexity</th><th scope="col" class="number">clients</th>
{% if tokens %}<th scope="col" class="number">tokens</th>{% endif %}</tr></thead><tbody>
{% for row in rounds %}
<tr><td class="number">{{ row.round }}</td><td class="number">{{ row.train_loss | loss }}</td>
<td class="number">{{ row.val_loss | loss }}</td>
<td class="number">{{ row.client_val_loss | loss }}</td>
<td class="number">{{ row.perplexity }}</td>
<td class="number">{{ row.clients | exact }}</td>
{% if tokens %}<td class="number">{{ tokens[row.round] | exact }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
{% endcall %}
</section>

<section id="samples">
<h2>From babble to verse</h2>
{% if newest %}
<p class="soft">{{ newest.title }}</p>
<p class="sample final"><bdi>{{ newest.text }}</bdi></p>
{% else %}
<p class="soft">There is no sample.</p>
{% endif %}
{% if samples.open %}
<h3>{{ "The sample of each round" if not samples.others else "Samples of some rounds" }}</h3>
<div class="samples">{% for sample in samples.open %}{{ seen(sample) }}{% endfor %}</div>
{% endif %}
{% if samples.others %}
<details><summary>The samples of the other {{ samples.others | length }} rounds</summary>
<div class="samples">{% for sample in samples.others %}{{ seen(sample) }}{% endfor %}</div></details>
{% endif %}
</section>

<section id="parts">
<h2>Who holds what</h2>
{% for line in scheme %}<p>{{ line | sentence }}</p>{% endfor %}
{% if parts %}
{% call long_table(parts | length, "The texts of all %d clients" | format(parts | length)) %}
<thead><tr><th scope="col">client</th><th scope="col" class="number">training<br>characters</th>
<th scope="col" class="number">validation<br>characters</th>
{% if divided %}<th scope="col" class="number">plays</th><th scope="col" class="number">roles</th>
<th scope="col">divergence</th>{% endif %}
{% if client_losses %}<th scope="col">validation loss<br>by round, last</th>{% endif %}</tr></thead><tbody>
{% for row in parts %}
<tr><th scope="row"><bdi>{{ row.part.label | label }}</bdi>
{% if row.part.holds %}<br><small><bdi>{{ row.part.holds | sentence }}</bdi></small>{% endif %}</th>
<td class="number">{{ row.part.train | or_dash }}</td>
<td class="number">{{ row.part.val | or_dash }}</td>
{% if divided %}<td class="number">{{ row.part.plays | or_dash }}</td>
<td class="number">{{ row.part.speakers | or_dash }}</td>
<td class="number">{{ row.part.divergence | loss }}{{ row.divergence }}</td>{% endif %}
{% if client_losses %}<td class="number">{{ row.spark }}{{ row.last_loss | loss }}</td>{% endif %}</tr>
{% endfor %}
</tbody><tfoot><tr><th scope="row">all</th><td class="number">{{ characters[0] | or_dash }}</td>
<td class="number">{{ characters[1] | or_dash }}</td>
{% if divided %}<td></td><td></td><td></td>{% endif %}
{% if client_losses %}<td></td>{% endif %}</tr></tfoot>
{% endcall %}
{% endif %}
{% if divided %}<p class="note">Divergence compares the characters of a client's part with those
of the whole text. It is a Jensen-Shannon divergence, from 0 bits (alike) to 1 bit.</p>{% endif %}
</section>

<section id="traffic">
<h2>Traffic</h2>
{% if traffic %}
<p>{{ traffic.summary }}</p>
{% if traffic.chart %}{{ traffic.chart }}{% endif %}
{% for table in traffic.tables if table.rows %}
{% call long_table(table.rows | length, table.summary) %}
<thead><tr><th scope="col">{{ table.name }}</th><th scope="col" class="number">to clients</th>
<th scope="col" class="number">to server</th><th scope="col" class="number">both</th>
<th scope="col" class="number">in fp32</th><th scope="col" class="number">saving</th></tr></thead><tbody>
{% for row in table.rows %}
<tr><th scope="row"><bdi>{{ row.name | label }}</bdi></th><td class="number">{{ bytes(row.down) }}</td>
<td class="number">{{ bytes(row.up) }}</td><td class="number">{{ bytes(row.both) }}</td>
<td class="number">{{ bytes(row.fp32) }}</td><td class="number">{{ row.saving }}</td></tr>
{% endfor %}
</tbody><tfoot><tr><th scope="row">all</th>
{% for number in (traffic.all.down, traffic.all.up, traffic.all.both, traffic.all.fp32) %}
<td class="number">{{ bytes(number) }}<br><small>{{ number | exact }}</small></td>
{% endfor %}
<td class="number">{{ traffic.all.saving }}</td></tr></tfoot>
{% endcall %}
{% endfor %}
<p class="note">The bytes are those of the arrays in the messages of training and evaluation. 1 MB is
1,000,000 bytes.</p>
{% else %}
<p class="soft">The traffic is not known, because clients.jsonl is missing.</p>
{% endif %}
</section>

<section id="time">
<h2>Time</h2>
{% if time %}
<p>{{ time.summary }}</p>
{{ time.chart }}
<div class="scroll"><table><thead><tr><th scope="col">time for</th><th scope="col" class="number">all
rounds</th><th scope="col" class="number">share</th><th scope="col"></th></tr></thead><tbody>
{% for row in time.rows %}
<tr><th scope="row">{{ row.name }}</th><td class="number">{{ row.seconds | duration }}</td>
<td class="number">{{ "%.1f" | format(100 * row.share) }} %</td><td class="words soft">{{ row.words }}</td></tr>
{% endfor %}
</tbody><tfoot><tr><th scope="row">all</th><td class="number">{{ time.total | duration }}</td>
<td></td><td></td></tr></tfoot></table></div>
{% else %}
<p class="soft">The times are not known, because timings.jsonl is missing.</p>
{% endif %}
</section>

<section id="left-out">
<h2>Left out</h2>
{% if left_out is none %}
<p class="soft">It is not known who was left out, because clients.jsonl is missing.</p>
{% elif left_out %}
<div class="scroll"><table><thead><tr><th scope="col">round</th><th scope="col">phase</th>
<th scope="col">client</th><th scope="col">reason</th></tr></thead><tbody>
{% for row in left_out %}
<tr><td class="number">{{ row.rounds | label }}</td><td>{{ row.phase | label }}</td>
<th scope="row"><bdi>{{ row.client | label }}</bdi></th>
<td class="words"><bdi>{{ row.reason | sentence }}</bdi></td></tr>
{% endfor %}
</tbody></table></div>
{% if more_left_out %}<p class="note">clients.jsonl has {{ more_left_out | exact }} more.</p>{% endif %}
{% else %}
<p>No client was left out.</p>
{% endif %}
</section>

<section id="settings">
<h2>Settings</h2>
{% if settings %}
{% set changed = settings | selectattr("changed") | list %}
<p>{{ changed | length }} of {{ settings | length }} settings differ from the defaults of the app.
The seed is {{ seed | label }}.</p>
{% if changed %}
<div class="scroll"><table><thead><tr><th scope="col">setting</th><th scope="col">value</th>
<th scope="col">default</th></tr></thead><tbody>
{% for row in changed %}{{ setting(row) }}{% endfor %}
</tbody></table></div>
{% endif %}
<details><summary>All {{ settings | length }} settings</summary>
<div class="scroll"><table><thead><tr><th scope="col">setting</th><th scope="col">value</th>
<th scope="col">default</th></tr></thead><tbody>
{% for row in settings %}{{ setting(row) }}{% endfor %}
</tbody></table></div></details>
{% else %}
<p class="soft">The settings are not known, because config.json is missing.</p>
{% endif %}
<div class="pair">
{% for title, rows in tables if rows %}
<div><h3>{{ title }}</h3>{{ table_of(rows) }}</div>
{% endfor %}
</div>
</section>
<footer class="note">{{ footer }}</footer>
{% endblock %}
"""
