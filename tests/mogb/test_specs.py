import pytest

import mogb
from mogb.specs import Spec, SpecError, parse_spec, parse_specs


def test_a_comma_inside_parentheses_does_not_split_the_list():
    specs = parse_specs("mgda, cagrad(c=0.2, rescale=1),smoothed(normalized(mgda),decay=0.9)")
    assert specs == (
        Spec("mgda"),
        Spec("cagrad", (("c", 0.2), ("rescale", 1))),
        Spec("smoothed", (("decay", 0.9),), Spec("normalized", (), Spec("mgda"))),
    )
    assert specs[2].methods == ("smoothed", "normalized", "mgda")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-2", -2), ("0.5", 0.5), (".5", 0.5), ("2.", 2.0), ("1e-3", 1e-3), ("+1E2", 100.0),
        ("inf", float("inf")),
        ("true", True), ("False", False), ("none", None), ("l2", "l2"), ("loss+", "loss+"), ("'a b, c'", "a b, c"),
        ('"x"', "x"), ("[]", []), ("[1, 2.5,[x]]", [1, 2.5, ["x"]]),
    ],
)  # fmt: skip
def test_values_of_every_kind(text, value):
    ((_, read),) = parse_spec(f"method(option={text})").options
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "mgda",
        "cagrad(c=0.2)",
        "smoothed(mgda,decay=0.9)",
        "m(a=[1,2],b='x y',c=none,d=true,e=word,f=1e-05)",
        "m(a='true')",
    ],
)
def test_the_normal_form_reads_as_itself(text):
    assert str(parse_spec(text)) == text
    assert parse_spec(str(parse_spec(text))) == parse_spec(text)


def test_the_normal_form_forgets_spaces_and_the_order_of_options():
    assert str(parse_spec(" m ( b = 2 , a = 1 ) ")) == str(parse_spec("m(a=1,b=2)")) == "m(a=1,b=2)"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the text ends"),
        ("mgda,", "the text ends"),
        (",mgda", "',' stands there"),
        ("cagrad(c=0.2", "the text ends"),
        ("cagrad(c=0.2))", "')' stands there"),
        ("cagrad(c)", "wears no other method"),
        ("cagrad(c=)", "')' stands there"),
        ("cagrad(c=1,c=2)", "given twice"),
        ("cagrad(c=1 2)", "'2' stands there"),
        ("smoothed(decay=0.5,mgda)", "'mgda' stands there"),
        ("cagrad(c=1;2)", "cannot read"),
        ("cagrad(c=1.2.3)", "cannot read"),
        ("mgda mgda", "'mgda' stands there"),
        ("mgda,mgda", "named twice"),
        ("m(b=2,a=1),m(a=1,b=2)", "named twice"),
        ("__import__('os')", "stands there"),
        ("mgdaa", "unknown method 'mgdaa'"),
        ("cagrad(d=1)", "no option 'd'"),
        ("smoothed", "needs a method first"),
        ("smoothed(mgda,decays=1)", "no option 'decays'"),
        ("smoothed(mgda,inner=3)", "no option 'inner'"),
        ("smoothed(mgda,decay=2.0)", "decay must be in [0, 1)"),
        ("smoothed(graddrop)", "yields weights"),
        ("cagrad(c=-1)", "cagrad(c=-1): c must"),
        ("cagrad(c=abc)", "cagrad(c=abc): c must be a number, but got abc"),
        ("cagrad(c=true)", "c must be a number"),
        ("refreshed(mgda,every=2.5)", "every must be a whole number"),
        ("mgda(ignore_zero=3)", "ignore_zero must be true or false"),
    ],
)
def test_every_mistake_is_named(text, complaint):
    with pytest.raises(SpecError) as caught:
        [spec.build() for spec in parse_specs(text)]
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_methods_and_wrappers():
    with pytest.raises(SpecError, match=r"cagrad.*Wrappers: .*smoothed"):
        parse_spec("nope").build()


def test_one_method_is_one_method():
    with pytest.raises(SpecError, match="names 2 methods"):
        parse_spec("mgda,cagrad")


def test_options_and_wrappers_reach_the_aggregator():
    assert parse_spec("cagrad(c=0.2)").build() == mogb.make("cagrad", c=0.2)
    smoothed = parse_spec("smoothed(mgda,decay=0.25)").build()
    assert smoothed.decay == 0.25
    assert smoothed.inner == mogb.make("mgda")


def test_a_seed_reaches_random_methods_also_inside_wrappers_but_not_over_a_given_one():
    assert parse_spec("rlw").build(seed=7).seed == 7
    assert parse_spec("rlw(seed=3)").build(seed=7).seed == 3
    assert parse_spec("smoothed(rlw)").build(seed=7).inner.seed == 7
    assert parse_spec("mgda").build(seed=7) == mogb.make("mgda")
