"""What a recipe accepts, and the one line each refusal says."""

import copy

import pytest
import yaml
from pydantic import ValidationError

from mka.errors import RecipeError
from mka.methods import method_settings
from mka.pipeline.recipes import load_recipe, validate_recipe
from mka.recipe import Recipe

SMALLEST = {"name": "tiny", "model": {"folder": "models/tiny"}, "target": {"layers": 4}}


def recipe_with(**changes):
    """The smallest recipe with dotted keys (``__`` for the dot) set."""
    raw = copy.deepcopy(SMALLEST)
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return raw


def write(tmp_path, raw):
    path = tmp_path / "recipe.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw), encoding="utf-8")
    return path


def refusal(raw):
    with pytest.raises(RecipeError) as caught:
        validate_recipe(raw, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("r.yaml: ")
    return message


def test_the_smallest_recipe_fills_in_documented_defaults():
    recipe = validate_recipe(SMALLEST)
    assert recipe.model.label == "models/tiny"
    assert recipe.registered_name == "tiny"
    assert recipe.method.name == "uidl"
    assert recipe.quantize.scheme == "off"
    assert (recipe.target.protect_first, recipe.target.protect_last) == (2, 1)
    assert recipe.model.trust_remote_code is False


@pytest.mark.parametrize(
    ("changes", "repaired"),
    [
        ({}, (True, "distil")),
        ({"alignment__tokens": 512, "heal__tokens": 999}, (True, "distil")),
        ({"alignment__enabled": False}, (False, "distil")),
        ({"heal__mode": False}, (True, "off")),
        ({"heal__mode": "local"}, (True, "local")),
        ({"method__name": "uidl"}, (False, "off")),
        ({"method__name": "shortgpt", "heal__mode": "local"}, (False, "local")),
    ],
)
def test_only_what_no_method_is_named_for_is_repaired_by_itself(changes, repaired):
    recipe = validate_recipe(recipe_with(**changes))
    assert (recipe.alignment.enabled, recipe.heal.mode) == repaired
    # A record of it spells everything out and means the same.
    assert validate_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("changes", "key", "nearest"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model__foldr": "x"}, "model.foldr", "folder"),
        ({"calibration__sampels": 3}, "calibration.sampels", "samples"),
        ({"method__setting": {}}, "method.setting", "settings"),
        ({"target__layer": 3}, "target.layer", "layers"),
        ({"quantize__groupsize": 64}, "quantize.groupsize", "group_size"),
        ({"evaluation__contxt": 64}, "evaluation.contxt", "context"),
        ({"gate__perplexity_recover": 0.5}, "gate.perplexity_recover", "perplexity_recovery"),
        ({"registry__tracking_url": "x"}, "registry.tracking_url", "tracking_uri"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(changes, key, nearest):
    assert f"unknown key '{key}' (did you mean '{nearest}'?)" in refusal(recipe_with(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method__name": "aligned"}, "method 'aligned' with operator concat-select needs alignment: {enabled: true}"),
        ({"method__name": "replaceme", "alignment__enabled": True}, "method 'replaceme' fits its own correction"),
        ({"alignment__enabled": True, "alignment__penalty": -1}, "penalty must be above 0, or 'auto', got -1"),
    ],
)
def test_a_method_and_an_alignment_that_do_not_go_together_are_refused(changes, message):
    assert message in refusal(recipe_with(**changes))


def test_a_method_that_leaves_nothing_to_an_alignment_does_without():
    changes = {"method__name": "aligned", "method__settings": {"operator": "keep"}}
    assert not validate_recipe(recipe_with(**changes)).alignment.enabled
    assert validate_recipe(recipe_with(method__name="aligned", alignment__enabled=True)).alignment.tokens == 32768


def test_an_unknown_key_like_no_other_lists_what_is_allowed():
    message = refusal(recipe_with(gate__zzz=1))
    assert "unknown key 'gate.zzz' (allowed: perplexity_recovery, task_recovery, champion_recovery, rules)" in message


def test_every_mistake_is_listed_in_one_line():
    message = refusal(recipe_with(seeed=1, target__layers=None, calibration__samples=0))
    assert "'seeed' (did you mean 'seed'?)" in message
    assert "'calibration.samples': Input should be greater than or equal to 1, got 0" in message
    assert "'target': at least one of layers, layer_ratio, size_ratio, bytes, cache_bytes_per_token, decode" in message


@pytest.mark.parametrize("missing", ["name", "model", "target"])
def test_missing_keys_are_named(missing):
    raw = {key: value for key, value in SMALLEST.items() if key != missing}
    assert f"missing key '{missing}'" in refusal(raw)


def test_an_unknown_method_is_refused_with_the_nearest_and_the_list():
    with pytest.raises(
        RecipeError,
        match=r"unknown method 'shortgtp' \(did you mean 'shortgpt'\?\); methods: aligned, evolution, laco, ",
    ):
        validate_recipe(recipe_with(method__name="shortgtp"))


def test_an_unknown_setting_of_a_method_is_refused_with_the_nearest():
    message = refusal(recipe_with(method__name="mka", method__settings={"bandwith": 8}))
    assert "settings of method 'mka': unknown key 'bandwith' (did you mean 'bandwidth'?)" in message


def test_a_setting_of_another_method_is_refused():
    assert "unknown key 'bandwidth'" in refusal(recipe_with(method__name="shortgpt", method__settings={"bandwidth": 8}))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weight": 0.5}, "weight goes with weights: fixed"),
        ({"weights": "fixed"}, "weight goes with weights: fixed"),
        ({"weights": "line-search", "weight": 0.5}, "weight goes with weights: fixed"),
        ({"grid": [0, 1]}, "grid goes with weights: line-search"),
        ({"weights": "line-search", "grid": [0, 0.5]}, "include 0 and 1"),
        ({"weights": "line-search", "grid": [0.5, 1]}, "include 0 and 1"),
        ({"weights": "line-search", "grid": [-0.5, 0, 1]}, "lie in [0, 1]"),
        ({"weights": "fixed", "weight": 1.5}, "less than or equal to 1"),
        ({"coordinates": 4}, "less than or equal to 3"),
        ({"kernel_exponent": 0}, "greater than 0"),
        ({"selection": "greedy"}, "'one-shot' or 'iterative'"),
    ],
)
def test_settings_that_would_do_nothing_or_lie_outside_their_range_are_refused(settings, reason):
    assert reason in refusal(recipe_with(method__name="mka", method__settings=settings))


def test_settings_that_belong_together_are_accepted():
    assert method_settings("mka", {"weights": "fixed", "weight": 0.25}).weight == 0.25
    assert method_settings("mka", {"weights": "line-search", "grid": [0, 0.3, 1]}).grid == (0.0, 0.3, 1.0)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({}, "exactly one of hub, folder, package, registered must name the model, got none"),
        ({"hub": "a/b", "folder": "c"}, "got ['hub', 'folder']"),
        ({"folder": "c", "package": "p==1"}, "got ['folder', 'package']"),
        ({"folder": "c", "revision": "main"}, "revision belongs to a hub model"),
        ({"hub": "a/b", "sha256": "0" * 64}, "sha256 belongs to a package"),
        ({"package": "p"}, "package must be pinned as NAME==VERSION, got 'p'"),
        ({"package": "p==1", "sha256": "abc"}, "'model.sha256'"),
        ({"package": ["p==1", "q"]}, "package must be pinned as NAME==VERSION, got 'q'"),
        ({"package": ["p==1", "p==1"]}, "package names the same twice"),
        ({"package": []}, "'model.package': must be one text or a list of texts"),
        ({"package": ["p==1", 2]}, "'model.package': must be one text or a list of texts"),
        ({"package": ["p==1", "q==1"], "sha256": ["0" * 64]}, "must both be one text, or lists of the same length"),
        ({"package": ["p==1", "q==1"], "sha256": "0" * 64}, "must both be one text, or lists of the same length"),
        ({"package": "p==1", "sha256": ["0" * 64]}, "must both be one text, or lists of the same length"),
        ({"package": ["p==1", "q==1"], "sha256": ["0" * 64, "g" * 64]}, "'model.sha256': must be 64 hexadecimal"),
        ({"folder": "c", "dtype": "float8"}, "'model.dtype'"),
    ],
)
def test_exactly_one_well_formed_source(model, reason):
    assert reason in refusal(SMALLEST | {"model": model})


@pytest.mark.parametrize("model", [{"hub": "a/b", "revision": "main"}, {"package": "p==1", "sha256": "0" * 64}])
def test_every_source_is_accepted_with_what_belongs_to_it(model):
    assert validate_recipe(SMALLEST | {"model": model}).model.label in ("a/b", "p==1")


def test_a_model_in_several_packages_survives_writing_and_keeps_its_order():
    model = {"package": ["q==1", "p==1", "r==2"], "sha256": ["0" * 64, "1" * 64, "2" * 64]}
    recipe = validate_recipe(SMALLEST | {"model": model})
    assert recipe.model.label == "q==1 and 2 more"
    dumped = recipe.model_dump(mode="json")
    assert {key: dumped["model"][key] for key in model} == model
    assert validate_recipe(dumped) == recipe
    assert list(zip(recipe.model.packages, recipe.model.digests)) == list(zip(model["package"], model["sha256"]))
    assert validate_recipe(SMALLEST | {"model": {"package": ["q==1", "p==1"]}}).model.digests == (None, None)


def test_one_package_is_written_as_before():
    model = validate_recipe(SMALLEST | {"model": {"package": "p==1", "sha256": "0" * 64}}).model
    assert model.model_dump(mode="json", include={"package", "sha256"}) == {"package": "p==1", "sha256": "0" * 64}
    assert (model.packages, model.digests) == (("p==1",), ("0" * 64,))
    folder = validate_recipe(SMALLEST | {"model": {"folder": "m"}}).model
    assert (folder.packages, folder.digests) == ((), ())


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({}, "got none"),
        ({"protect_first": 1}, "got none"),
        ({"layers": 3, "layer_ratio": 0.5}, "got ['layers', 'layer_ratio']"),
        ({"layers": 3, "layer_ratio": 0.5, "size_ratio": 0.1}, "got ['layers', 'layer_ratio', 'size_ratio']"),
        ({"layer_ratio": 0.0}, "'target.layer_ratio'"),
        ({"layer_ratio": 1.0}, "'target.layer_ratio'"),
        ({"size_ratio": 1.5}, "'target.size_ratio'"),
        ({"layers": 2.5}, "'target.layers'"),
        ({"layers": 3, "protect_last": -1}, "'target.protect_last'"),
        ({"bytes": "many"}, "'target.bytes'"),
        ({"bytes": 0}, "'target.bytes'"),
        ({"decode_speed": 1.0}, "'target.decode_speed'"),
        ({"prefill_speed": 0.5}, "'target.prefill_speed'"),
    ],
)
def test_possible_targets(target, reason):
    assert reason in refusal(SMALLEST | {"target": target})


@pytest.mark.parametrize("name", ["", "Upper", "with space", "../up", ".hidden"])
def test_names_that_cannot_name_a_folder_and_a_registered_model_are_refused(name):
    assert "'name'" in refusal(SMALLEST | {"name": name})


@pytest.mark.parametrize("word", ["off", "'off'", "no"])
def test_yaml_off_means_off(tmp_path, word):
    path = write(tmp_path, yaml.safe_dump(SMALLEST) + f"quantize:\n  scheme: {word}\n")
    assert load_recipe(path).quantize.scheme == "off"


def test_yaml_on_is_no_scheme(tmp_path):
    path = write(tmp_path, yaml.safe_dump(SMALLEST) + "quantize:\n  scheme: on\n")
    with pytest.raises(
        RecipeError, match=r"'quantize.scheme': Input should be 'off', 'int8', .*, 'w8a8' or 'auto', got True"
    ):
        load_recipe(path)


def test_overrides_replace_add_and_are_checked_like_the_file(tmp_path):
    path = write(tmp_path, SMALLEST)
    recipe = load_recipe(path, {"target.layers": 3, "method.name": "mka", "method.settings.coordinates": 3, "seed": 7})
    assert (recipe.target.layers, recipe.method.settings, recipe.seed) == (3, {"coordinates": 3}, 7)
    assert load_recipe(path).target.layers == 4
    with pytest.raises(RecipeError, match=r"unknown key 'target.layrs' \(did you mean 'layers'\?\)"):
        load_recipe(path, {"target.layrs": 3})
    with pytest.raises(RecipeError, match=r"override 'name.first': 'name' is not a section"):
        load_recipe(path, {"name.first": "x"})


def test_an_override_can_swap_one_target_for_another(tmp_path):
    path = write(tmp_path, SMALLEST)
    with pytest.raises(RecipeError, match=r"got \['layers', 'layer_ratio'\]"):
        load_recipe(path, {"target.layer_ratio": 0.5})
    assert load_recipe(path, {"target.layers": None, "target.layer_ratio": 0.5}).target.layer_ratio == 0.5


def test_a_recipe_is_frozen():
    recipe = validate_recipe(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        recipe.target.layers = 3


def test_a_missing_file_says_where_recipes_live(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe not found: .*none.yaml; recipes live in recipes/"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [b"a: [1", b"a: \xff\xfe", b"\tx: 1"])
def test_what_is_no_yaml_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe .*bad.yaml cannot be read: ") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["name: a\nname: b\n", "target:\n  layers: 4\n  layers: 5\n"])
def test_a_key_said_twice_is_refused_by_name(tmp_path, content):
    path = tmp_path / "twice.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"twice\.yaml cannot be read: key '(name|layers)' is said twice .* line \d"):
        load_recipe(path)


@pytest.mark.parametrize("number", ["1" * 21, "1" + ":30" * 10, "0x" + "f" * 30])
def test_a_whole_number_that_no_computer_word_holds_is_refused_before_it_is_made(tmp_path, number):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: {number}\n")
    with pytest.raises(RecipeError, match=f"cannot be read: a number of {len(number)} digits; the largest allowed"):
        load_recipe(path)


@pytest.mark.parametrize("content", ["calibration: foo\n", "calibration:\n"])
def test_a_section_that_is_none_is_refused_as_the_file_says_it(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: .*'calibration'") as refused:
        load_recipe(path, {"calibration.rev": None})
    assert "override" not in str(refused.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(("content", "kind"), [("", "NoneType"), ("- a\n- b\n", "list"), ("words", "str")])
def test_what_is_no_mapping_is_refused(tmp_path, content, kind):
    path = write(tmp_path, content)
    with pytest.raises(RecipeError, match=f"a recipe is a mapping of keys to values, got {kind}"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"is not a section|a recipe is a mapping"):
        load_recipe(path, {"target.layers": 3})
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(path, {"seed": 3})


def test_an_empty_section_and_a_key_that_is_no_word_are_refused_by_name():
    assert "'gate': " in refusal(SMALLEST | {"gate": None})
    assert "'3': Keys should be strings, got 3" in refusal(SMALLEST | {3: "x"})


def test_dumping_and_reading_back_gives_the_same_recipe(tmp_path):
    recipe = validate_recipe(
        recipe_with(
            evaluation__tasks={"piqa": None, "boolq": 3},
            quantize__scheme="int4",
            method__name="mka",
            method__settings={"alpha": 1},
        )
    )
    path = write(tmp_path, yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(path) == recipe == Recipe.model_validate(recipe.model_dump())


def test_a_password_is_refused_and_not_repeated():
    with pytest.raises(RecipeError, match=r"registry\.tracking_uri.*MLFLOW_TRACKING_PASSWORD") as refusal:
        validate_recipe(recipe_with(registry__tracking_uri="http://me:hunter2@registry.example"))
    assert "hunter2" not in str(refusal.value)
    assert validate_recipe(recipe_with(registry__tracking_uri="http://registry.example"))
