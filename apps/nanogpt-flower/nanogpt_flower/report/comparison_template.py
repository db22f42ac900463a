"""The template of a comparison's page."""

TEMPLATE = """\
{% extends "base" %}

{% block content %}
<header>
<p class="eyebrow">nanogpt-flower · comparison</p>
<div class="title"><h1>Why federate?</h1></div>
<p class="facts">{% for fact in facts %}<span>{{ fact | label }}</span>{% endfor %}</p>
<p class="lead">Taking part gave {{ better }} of {{ clients | length }} clients a lower loss on their
own text. On average the loss {{ "fell" if gain >= 0 else "rose" }} by {{ gain | abs | loss }}.
On everybody's text, the federated loss is {{ cost | abs | loss }}
{{ "above" if cost >= 0 else "below" }} that of all text in one place.</p>
<dl class="cards" style="--cards: 4">
{% for name, figure, under in cards %}
<div><dt>{{ name }}</dt><dd class="figure">{{ figure }}</dd><dd class="under">{{ under }}</dd></div>
{% endfor %}
</dl>
</header>

<section id="losses">
<h2>Losses</h2>
<p>Each client has the same budget of steps in all three cases. <em>Alone</em>, it trains on its own
text. <em>Federated</em>, all clients train together. In <em>one place</em>, one machine trains on the
text of all clients, with batches as large as those of all clients together. A dot further left is a
lower loss.</p>
{% for title, chart in charts %}
<h3>{{ title }}</h3>{{ chart }}
{% endfor %}
<div class="scroll"><table><thead><tr><th scope="col">client</th>
<th scope="col" class="number">training<br>characters</th>
<th scope="col" class="number">own text,<br>alone</th><th scope="col" class="number"><br>federated</th>
<th scope="col" class="number"><br>gain</th><th scope="col" class="number"><br>one place</th>
<th scope="col" class="number">everybody's,<br>alone</th>
<th scope="col" class="number"><br>federated</th>
<th scope="col" class="number"><br>one place</th></tr></thead><tbody>
{% for row in clients %}
<tr><th scope="row"><bdi>{{ row.label | label }}</bdi>
{% if row.holds %}<br><small><bdi>{{ row.holds | join(", ") | sentence }}</bdi></small>{% endif %}</th>
<td class="number">{{ row.train | exact }}</td>
<td class="number">{{ row.own.alone | loss }}</td><td class="number">{{ row.own.federated | loss }}</td>
<td class="number">{{ "%+.4f" | format(row.gain) }}</td>
<td class="number">{{ row.own.one_place | loss }}</td>
<td class="number">{{ row.everybody.alone | loss }}</td>
<td class="number">{{ row.everybody.federated | loss }}</td>
<td class="number">{{ row.everybody.one_place | loss }}</td></tr>
{% endfor %}
</tbody><tfoot><tr><th scope="row">mean</th><td></td>
<td class="number">{{ means.own.alone | loss }}</td><td class="number">{{ means.own.federated | loss }}</td>
<td class="number">{{ "%+.4f" | format(gain) }}</td>
<td class="number">{{ means.own.one_place | loss }}</td>
<td class="number">{{ means.everybody.alone | loss }}</td>
<td class="number">{{ means.everybody.federated | loss }}</td>
<td class="number">{{ means.everybody.one_place | loss }}</td></tr></tfoot></table></div>
<p class="note">The losses are in nats per character. A positive gain is a lower loss. The federation
itself has a page of its own, federated/report.html.</p>
</section>

<section id="settings">
<h2>Settings</h2>
<p>SHA-256 of the text: <code>{{ digest | label }}</code></p>
<div class="pair">
<div><h3>Machine</h3><div class="scroll"><table><tbody>
{% for name, value in machine %}
<tr><th scope="row">{{ name | label }}</th><td class="words">{{ value | sentence }}</td></tr>
{% endfor %}
{% for name, value in seconds %}
<tr><th scope="row">time, {{ name }}</th><td class="words">{{ value }}</td></tr>
{% endfor %}
</tbody></table></div></div>
<div><h3>All settings</h3><div class="scroll"><table><tbody>
{% for key, value in settings %}
<tr><td><code>{{ key | label }}</code></td><td class="words">{{ value | sentence }}</td></tr>
{% endfor %}
</tbody></table></div></div>
</div>
</section>
{% endblock %}
"""
