"""benchmarks/noveltybench.py: which answer a completion names, by hand."""

import importlib.util
import json
import math
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("novelty_script", ROOT / "benchmarks" / "noveltybench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "prompt, completion, answer",
    [
        ("curated-88", "You rolled a 17!", "17"),
        ("curated-88", "The 20-sided die shows 7.", "7"),
        ("curated-88", "A 20-sided die.", None),  # what was asked, and no roll
        ("curated-88", "7, or 8", None),
        ("curated-88", "1. Roll a die.\n2. Read it.", None),
        ("curated-88", "1) Roll a die: it shows 17.", "17"),
        ("curated-88", "it shows -7", None),
        ("curated-90", "A number from 1-50", None),
        ("curated-90", "1,234 or 2,000,003", None),
        ("curated-97", "3.14", None),
        ("curated-97", "The first digit of the 12 digits is:7.", "7"),
        ("curated-88", "You rolled a 21.", None),
        ("curated-90", "I picked 100", "100"),  # and not 1, 10
        ("curated-67", "One of them is EQUATORIAL GUINEA.", "Equatorial Guinea"),
        ("curated-85", "The Queen of Hearts, yes, the queen of hearts.", "queen of hearts"),
        ("curated-85", "10 of Clubs", "ten of clubs"),
        ("curated-74", "Harry Potter and the Sorcerer's Stone", "Philosopher's Stone"),
        ("curated-47", "Half full, not half empty", None),
        ("curated-58", "N'Djamena, the capital of Chad", "N'Djamena"),
        ("curated-58", "Paris", None),
        ("curated-58", "N\N{RIGHT SINGLE QUOTATION MARK}Djamena", "N'Djamena"),
        ("curated-58", "Yaound\u00e9 is the capital of Cameroon.", "Yaounde"),
        ("curated-58", "Yaounde\u0301, or Lom\u00e9", None),
        ("curated-58", "S\u00e3o Tom\u00e9", "Sao Tome"),
        ("curated-58", "Cape\nTown, as Pretoria, is one of South Africa's", "Pretoria"),
        ("curated-58", "Porto Novo", "Porto-Novo"),
        ("curated-67", "M\u00e9xico, not New Mexico", "Mexico"),
        ("curated-67", "New Mexico", None),
        ("curated-74", "The Half Blood Prince", "Half-Blood Prince"),
        ("curated-74", "the Sorcerer\N{RIGHT SINGLE QUOTATION MARK}s Stone", "Philosopher's Stone"),
        ("curated-47", "I see it as half-full.", "half full"),
        ("curated-85", "the twenty-three of hearts", None),
    ],
)
def test_an_answer_is_named_alone(script, prompt, completion, answer):
    assert script.which(completion, script.ANSWERS[prompt]) == answer
    assert script.names_one([completion], [script.ANSWERS[prompt]]) == [float(answer is not None)]


def test_sets_have_no_answer_twice(script):
    sizes = {key: len(names) for key, names in script.ANSWERS.items()}
    assert sizes == {
        "curated-47": 2, "curated-48": 2, "curated-58": 54, "curated-67": 20, "curated-70": 6, "curated-74": 7,
        "curated-85": 52, "curated-87": 15, "curated-88": 20, "curated-90": 100, "curated-97": 10,
    }  # fmt: skip
    assert all(len({name.casefold() for name in names}) == len(names) for names in script.ANSWERS.values())


def test_capitals_are_those_of_54_countries(script):
    """By country, in the alphabetical order of their English names."""
    countries = """Algeria Algiers, Angola Luanda, Benin Porto-Novo, Botswana Gaborone, Burkina_Faso Ouagadougou,
    Burundi Gitega, Cameroon Yaounde, Cape_Verde Praia, Central_African_Republic Bangui, Chad N'Djamena, Comoros Moroni,
    Congo Brazzaville, Democratic_Republic_of_the_Congo Kinshasa, Djibouti Djibouti, Egypt Cairo, Equatorial_Guinea
    Malabo, Eritrea Asmara, Eswatini Mbabane, Ethiopia Addis Ababa, Gabon Libreville, Gambia Banjul, Ghana Accra, Guinea
    Conakry, Guinea-Bissau Bissau, Ivory_Coast Yamoussoukro, Kenya Nairobi, Lesotho Maseru, Liberia Monrovia, Libya
    Tripoli, Madagascar Antananarivo, Malawi Lilongwe, Mali Bamako, Mauritania Nouakchott, Mauritius Port Louis, Morocco
    Rabat, Mozambique Maputo, Namibia Windhoek, Niger Niamey, Nigeria Abuja, Rwanda Kigali, Sao_Tome_and_Principe Sao
    Tome, Senegal Dakar, Seychelles Victoria, Sierra_Leone Freetown, Somalia Mogadishu, South_Africa Pretoria,
    South_Sudan Juba, Sudan Khartoum, Tanzania Dodoma, Togo Lome, Tunisia Tunis, Uganda Kampala, Zambia Lusaka, Zimbabwe
    Harare"""
    capitals = [" ".join(row.split()[1:]) for row in countries.split(",")]
    assert sorted(capitals) == sorted(script.ANSWERS["curated-58"]) and len(capitals) == 54


def test_numbers_at_an_optimum(script):
    """Known masses, and what they leave, shared by those without one; and the number that few draws show of many."""
    assert script.numbers([0.25, 0.25, 0.25, None])[0] == pytest.approx(4)
    assert script.numbers([0.5, None, None])[0] == pytest.approx(2**1.5)
    assert all(math.isnan(number) for number in script.numbers([None]))
    number, shown = script.numbers([0.01] * 100)
    assert number == pytest.approx(100) and 42 < shown < 45  # as an evaluation of 64 completions of it would say
    assert script.numbers([1.0]) == [1.0, 1.0]


def test_a_file_without_the_benchmarks_prompts_is_refused(script, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"id": "curated-88", "prompt": "Roll a die."}) + "\n")
    with pytest.raises(SystemExit, match="has 1 of the 11 prompts with finite answers"):
        script.write_prompts(path, tmp_path / "out")
