import pytest

from throughtime.errors import InputError
from throughtime.lm.options import ABOUT, BUDGET, DATA, KINDS, NAMES, WATCHING
from throughtime.lm.space import Choices, Span, read_space, usual_space


def test_text_is_read_as_the_command_line_takes_it():
    given = {
        "hidden": "64..512",
        "lr": "1e-3..0.1",
        "dropout": "0..0.5",
        "cell": "lstm,gru",
        "layers": "2,4",
        "steps": "5",
    }
    fixed, space = read_space(given)
    assert fixed == {"steps": 5}
    assert space == {
        "hidden": Span(64, 512, log=True),
        "lr": Span(0.001, 0.1, log=True),
        "dropout": Span(0.0, 0.5, log=False),
        "cell": Choices(("lstm", "gru")),
        "layers": Choices((2, 4)),
    }
    assert read_space({name: axis.plain for name, axis in space.items()}) == ({}, space)


def test_lists_are_choices_and_a_list_of_one_is_fixed():
    assert read_space({"tied": [True, False], "hidden": [8]}) == ({"hidden": 8}, {"tied": Choices((True, False))})


def test_text_that_is_never_searched_stays_as_it_is():
    assert read_space({"include": "*.{a,b}..c", "freeze": "1,2"})[1] == {}


def test_every_option_says_how_it_is_searched():
    for name, about in ABOUT.items():
        if about.panel in (DATA, BUDGET, WATCHING):
            assert not about.search, name
        elif name not in ("preset", "freeze", "seed", "device", "from_weights"):
            numbers = {int, float} & {*getattr(KINDS[name], "__args__", (KINDS[name],))}
            assert about.search, name
            assert (about.search == NAMES) == (not numbers), name


def test_the_usual_space_is_around_what_training_takes():
    space = usual_space({"cell": "gru"}, {"hidden": 100, "lr": 0.01})
    assert {name: str(axis) for name, axis in space.items()} == {
        "hidden": "50..200", "lr": "0.001..0.03", "dropout": "0..0.6",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hidden": "64..64"}, "a range LOW..HIGH, the first number below the second"),
        ({"hidden": "9..3"}, "the first number below the second"),
        ({"hidden": "4.."}, "a whole number, or a range, such as 1..64"),
        ({"hidden": "1..1" + "0" * 400}, "the first number below the second"),
        ({"lr": "nan..1"}, "the first number below the second"),
        ({"clip": "0..1"}, "from above 0, since it is searched on a log scale; or choices, such as --clip 0,1"),
        ({"hidden": "1..99999999999999999999"}, "the first number below the second, and both of them below 2^63"),
        ({"lr": "1..inf"}, "the first number below the second, and both of them below 2^63"),
        ({"hidden": "4..8..16"}, "hidden = '4..8..16': expected a whole number, or a range, such as 1..64"),
        ({"hidden": "4..8,16"}, "hidden = '4..8,16': expected choices, or one range, such as 1..64, not both"),
        ({"hidden": "4,,8"}, "hidden = '4,,8': expected two values or more, each of them once"),
        ({"level": "char,word"}, "level = 'char,word': expected one value; it isn't searched"),
        ({"preset": "char-rnn,awd-lstm"}, "one value; it isn't searched"),
        ({"cell": "lstm..gru"}, "choices, not a range, such as --cell lstm,gru"),
        ({"cell": "lstm,lstm"}, "two values or more, each of them once"),
        ({"cell": "lstm,"}, "two values or more, each of them once"),
        ({"minutes": "1..5"}, "one value; it isn't searched"),
        ({"seed": [1, 2]}, "one value; it isn't searched"),
        ({"minutes": "long"}, "a number; it isn't searched"),
        ({"cell": "lstm", "hidden": 8, "lr": 0.1, "dropout": 0.0}, ""),
    ],
)
def test_what_cant_be_searched_is_refused(given, said):
    with pytest.raises(InputError) as caught:
        usual_space(read_space(given)[0], {})
    assert said in str(caught.value)


@pytest.mark.parametrize("values", [[], [[4, 5], [6, 7]], [4, [5]], [4, {"a": 1}], [{"a": 1}, 4]])
def test_a_list_that_holds_no_choices_is_refused(values):
    with pytest.raises(InputError, match="two values or more, each of them once"):
        read_space({"hidden": values})


@pytest.mark.parametrize(("name", "high"), [("lr", 1), ("hidden", 8), ("batch", 8)])
def test_zero_is_advised_only_where_it_can_be(name, high):
    with pytest.raises(InputError) as caught:
        read_space({name: f"0..{high}"})
    assert str(caught.value).endswith("a range from above 0, since it is searched on a log scale")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tied": [True, 4]}, "tied = 4: expected true or false"),
        ({"tied": [True, 1]}, "tied = 1: expected true or false"),
        ({"tied": [False, "true"]}, "tied = 'true': expected true or false"),
        ({"hidden": [4, 4.0]}, "hidden = 4.0: expected a whole number"),
        ({"hidden": [4, True]}, "hidden = True: expected a whole number"),
        ({"hidden": [4, 0, 8]}, "hidden = 0: expected a whole number, at least 1"),
        ({"lr": [0.1, float("nan")]}, "lr = nan: expected a number above 0"),
        ({"cell": ["lstm", 4]}, "cell = 4: expected text"),
        ({"dtype": ["float32", "float16", "bfloat16"]}, "unknown dtype 'float16'; did you mean 'bfloat16'?"),
    ],
)
def test_each_choice_is_of_the_options_kind(given, said):
    with pytest.raises(InputError) as caught:
        read_space(given)
    assert said in str(caught.value)


def test_a_list_of_one_is_what_it_holds():
    assert read_space({"hidden": ["4..8"], "cell": ["lstm,gru"]})[1] == {
        "hidden": Span(4, 8, log=True),
        "cell": Choices(("lstm", "gru")),
    }
