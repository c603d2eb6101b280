"""The limit of chat templates on time and output; what a template may do below it."""

import resource
import time

import pytest

from rlhfjax.data.sandbox import LONGEST_SOURCE, MOST_NODES, Program, explain
from rlhfjax.data.template_cost import ITEM, LIMIT, Budget
from rlhfjax.errors import DataError

CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "it"}]
GROW = "{% set ns = namespace(x='a', l=[1], t=(1,), k=3) %}{% for i in range(900) %}"
NEST = GROW + "{% set ns.l = [ns.l, ns.l] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
TEXT = "{% set x = 'ab' * 50000 %}{% for i in range(100000) %}"

TOO_MUCH = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if i < 0 %}{% endfor %}{% endfor %}",
    "{% for i in range(50) recursive %}{{ loop(range(50)) if loop.depth < 30 }}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}"
    "{% for i in range(99999) %}{% call f() %}abc{% endcall %}{% endfor %}",
    "{% for i in range(99999) %}" + "a" * 9000 + "{% endfor %}",
    # operators
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * [1] }}",
    "{{ 10**(10**8) }}",
    "{{ '%1000000000s' % 'a' }}",
    "{{ '%*s' % (10**9, 'a') }}",
    "{{ '%(a).1000000000f' % {'a': 1.5} }}",
    # methods and filters that pad
    *(f"{{{{ 'a'.{name}(10**9) }}}}" for name in ("center", "ljust", "rjust", "zfill")),
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a' | center(width=1000000000) }}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format('a', w='>1000000000') }}",
    "{{ '{a:.1000000000f}'.format_map({'a': 1.5}) }}",
    "{{ '%1000000000s' | format('a') }}",
    "{{ strftime_now('%99999999d') }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ 1 | round(10**8, 'floor') }}",
    "{{ [1] | map('round', 10**8, 'floor') | list }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{% filter center(10**9) %}a{% endfilter %}",
    # what multiplies
    "{{ ('a' * 9**5).replace('a', 'b' * 9**5) }}",
    "{{ ('a' * 9**5) | replace(old='', new='b' * 9**5) }}",
    "{{ ('a' * 9**5).join(range(9**5) | map('string')) }}",
    "{{ range(9**5) | join('a' * 9**5) }}",
    "{{ ('a ' * 9**5) | wordwrap(1, wrapstring='b' * 9**5) }}",
    "{{ ([[1, 2]] * 9**5) | sum(start=[]) | length }}",
    # what doubles
    GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    GROW + "{% set ns.k = ns.k ** 3 %}{% endfor %}",
    GROW + "{% set ns.k = ns.k * ns.k %}{% endfor %}",
    GROW + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    GROW + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    GROW + "{% set ns.x = ns.x | tojson | tojson %}{% endfor %}",
    # a list that contains itself often is as long as what prints, compares or hashes it
    NEST + "{{ ns.l }}",
    NEST + "{{ ns }}",
    NEST + "{{ ns.l | string | length }}",
    NEST + "{{ ns.l | tojson }}",
    NEST + "{{ '%s' % [ns.l] }}",
    NEST + "{{ '{!r}'.format(ns.l) }}",
    NEST + "{{ ns.l == [ns.l] }}",
    NEST + "{{ [ns.l] is eq(ns.l) }}",
    NEST + "{{ [ns.l] in [[ns.l]] }}",
    NEST + "{{ [ns.l].index(ns.l + []) }}",
    NEST + "{{ ns.l is lower }}",
    NEST + "{{ {ns.t: 1} }}",
    NEST + "{{ {}[ns.t] }}",
    NEST + "{{ {}.get(ns.t) }}",
    NEST + "{{ [ns.t] | unique | list }}",
    NEST + "{{ raise_exception(ns.l) }}",
    # what is slow, and often
    TEXT + "{% set y = x.upper() %}{% endfor %}",
    TEXT + "{% set y = x | title %}{% endfor %}",
    TEXT + "{% set y = x[::-1] %}{% endfor %}",
    TEXT + "{% set y = x.split('b') %}{% endfor %}",
    TEXT + "{% if 'bb' in x %}{% endif %}{% endfor %}",
    TEXT + "{% if x ~ 'c' in x %}{% endif %}{% endfor %}",
]


def peak() -> int:
    """Returns the most memory that the process had so far, in bytes (Linux)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def outcome(source: str, messages=CHAT) -> str:
    """Returns what a template writes, or why it fails."""
    try:
        program = Program(source, "chat_template.jinja")
    except DataError as error:
        return str(error)
    try:
        return program.render([dict(message) for message in messages], bos_token="<s>")
    except Exception as error:
        return explain(error)


@pytest.mark.parametrize("source", TOO_MUCH)
def test_a_template_that_does_too_much_ends_at_once_in_one_line(source):
    start, before = time.process_time(), peak()
    reason = outcome(source)
    seconds, memory = time.process_time() - start, peak() - before
    assert reason.startswith("it exceeds the limit on time and output: 1,"), reason[:99]
    assert "characters, or " in reason and "\n" not in reason
    assert seconds < 2 and memory < 100e6


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ x | nosuch }}", "No filter named 'nosuch'., line 1"),
        ("a\n{% if 1 %}{{ x | nosuch }}{% endif %}", "'nosuch' found., line 2"),
        ("a\nb{{ nosuch(1) }}", "'nosuch' is undefined, line 2"),
        (
            "a\n{% for %}",
            "Expected an expression, got 'end of statement block', line 2",
        ),
        ("{% break %}", "not Jinja"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "it is nested too deeply"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "nested too deeply"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("a" * (LONGEST_SOURCE + 1), "has 100,001 characters; at most 100,000"),
        ("{{ [" + "x," * MOST_NODES + "] }}", "expressions; at most 20,000"),
        ("{{ [1] | random }}", "No filter named 'random'"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ 'a'.encode() }}", "unsafe"),
        ("{{ (1).to_bytes(9, 'big') }}", "unsafe"),
        ("{{ 'a'.translate({97: 'b'}) }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.format.__globals__.x }}", "unsafe"),
        ("{{ '{0.__class__.x}'.format(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('a' * 99999) }}", "a" * 300),
        ("{{ raise_exception('\\ud800') }}", "\\ud800"),
    ],
)
def test_a_template_that_fails_says_why_and_where_in_one_line(source, why):
    reason = outcome(source)
    assert why in reason and "\n" not in reason and len(reason) < 400


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        (
            "{% for m in messages %}{{ loop.index }}{{ m.role }}{% endfor %}",
            "1user2assistant",
        ),
        ("{{ messages[0]['content'].split(' ')[-1].upper() }}", "CAT"),
        ("{{ messages | map(attribute='role') | join('/') }}", "user/assistant"),
        ("{{ messages | selectattr('role', 'eq', 'user') | list | length }}", "1"),
        (
            "{{ '%s-%03d' % ('a', 7) }}{{ '{:>3}{x!r}'.format('b', x='c') }}",
            "a-007  b'c'",
        ),
        ("{{ {'a': [1, 'é']} | tojson }}", '{"a": [1, "é"]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ ('<' | safe) ~ 'a\n' | trim | indent }}{{ 7 // 2 }}{{ 7 % 4 }}", "<a33"),
        ("{% macro f(x, y='d') %}{{ x ~ y }}{% endmacro %}{{ f('c') }}", "cd"),
        ("{{ bos_token + 'a' + ('b' if messages else 'c') * 2 }}", "<s>abb"),
        ("{{ messages.items is defined }}{{ {'items': 1}['items'] }}", "False1"),
        ("{{ {'get': 1}.get('get') }}{{ {'x': 2}.x }}", "12"),
        (
            "{% for x in [1, [2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
            "12",
        ),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "01",
        ),
    ],
)
def test_what_templates_do_works(source, text):
    assert outcome(source) == text


def test_the_limit_grows_with_the_conversation():
    source = (
        "{% for m in messages %}{{ m.content | trim | replace('a', 'b') }}{% endfor %}"
    )
    long = [{"role": "user", "content": "a" * 1000}] * 200
    assert outcome(source, long) == "b" * 200_000
    assert outcome("{% for i in range(60000) %}{% endfor %}", long) == ""
    assert outcome("{% for i in range(60000) %}{% endfor %}") != ""


def test_sizes_by_hand():
    budget = Budget()
    assert budget.size("abc") == ITEM + 3
    assert budget.size(["ab", ("c",)]) == 3 * ITEM + 2 * ITEM + ITEM + ITEM + 2 + 1
    budget.spend(LIMIT)
    with pytest.raises(Exception, match="it exceeds the limit"):
        budget.spend(1)
    budget.start(CHAT)
    assert budget.left == LIMIT + 2 * 50_000 + 9 * 300 and budget.spent == LIMIT + 1
