"""The text of the rules: exact for a few fleets, and its promises for any."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ruleset
from fakes_netfilter import DOCKERS, FakeNetfilter
from listings import Listing, connections, parse_table
from ruleset import Endpoint, Features, Table

GOLDEN = Path(__file__).parent / "golden"
HOOKS = ("PREROUTING", "POSTROUTING", "INPUT", "FORWARD", "OUTPUT")
TARGETS = ("DNAT", "MASQUERADE", "DROP", "RETURN", "CONNMARK", "CT")
CHECKER = "198.18.0.1"


def endpoints(weights: Sequence[float], first: str = "198.18.0.2") -> list[Endpoint]:
    return [Endpoint(str(IPv4Address(first) + i), 8000, weight) for i, weight in enumerate(weights)]


def weighted(weight: st.SearchStrategy[float]) -> st.SearchStrategy[list[Endpoint]]:
    """Fleets as Docker numbers them, in a row, and fleets with any addresses at all."""
    last = 2**32 - 1
    scattered = st.lists(st.integers(0, last), unique=True, max_size=40)
    in_a_row = st.builds(lambda first, n: list(range(first, first + n)), st.integers(0, last - 40), st.integers(0, 40))

    def with_weights(numbers: list[int]) -> st.SearchStrategy[list[Endpoint]]:
        weights = st.lists(weight, min_size=len(numbers), max_size=len(numbers))
        addresses = [str(IPv4Address(number)) for number in numbers]
        return weights.map(lambda ws: [Endpoint(ip, 8000, w) for ip, w in zip(addresses, ws, strict=True)])

    return (scattered | in_a_row).flatmap(with_weights)


EQUAL = weighted(st.just(1.0))
ANY = weighted(st.just(0.0) | st.floats(0.001, 1000.0))
# Two states of one small address range: backends come, go, and change weight between them.
STEPS = st.lists(
    st.dictionaries(st.integers(2, 40), st.sampled_from([0.0, 0.5, 1.0, 3.0]), max_size=30).map(
        lambda fleet: [Endpoint(f"198.18.0.{number}", 8000, weight) for number, weight in fleet.items()]
    ),
    min_size=2,
    max_size=4,
)


def listing(kernel: FakeNetfilter, table: str = "nat") -> Listing:
    return parse_table(kernel.table(table))


def put(kernel: FakeNetfilter, table: Table) -> str:
    """Takes the kernel to `table`; the text that did it."""
    text = ruleset.restore(table, listing(kernel, table.name))
    kernel.apply(text)
    return text


def jumps(rules: Sequence[str]) -> list[tuple[float, str]]:
    found = [re.fullmatch(r"(?:-m statistic --mode random --probability (\S+) )?-j (LB-\S+)", rule) for rule in rules]
    return [(float(match[1] or 1), match[2]) for match in found if match]


def shares(chains: ruleset.Chains, chain: str = "LB-DISPATCH", arriving: float = 1.0) -> dict[str, float]:
    """The part of all new connections that each backend gets, found by walking the rules as a packet does."""
    reached: dict[str, float] = {}
    assert len(jumps(chains[chain])) == len(chains[chain])
    for chance, target in jumps(chains[chain]):
        taken, arriving = arriving * chance, arriving * (1 - chance)
        if target.startswith("LB-B-"):
            reached[target.removeprefix("LB-B-")] = taken
        else:
            reached |= shares(chains, target, taken)
    assert arriving == 0 or not chains[chain]  # nobody falls through to nowhere
    return reached


def applied(rotation: Sequence[Endpoint]) -> ruleset.Chains:
    """The chains of a kernel that has been given `rotation`."""
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(rotation))
    return dict(listing(kernel).chains)


# -- exact text ------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], Table]] = {
    "nat-1": lambda: ruleset.nat(endpoints([1.0])),
    "nat-2": lambda: ruleset.nat(endpoints([1.0] * 2)),
    "nat-3": lambda: ruleset.nat(endpoints([1.0] * 3)),
    "nat-5": lambda: ruleset.nat(endpoints([1.0] * 5)),
    "nat-2-backend-subnet": lambda: ruleset.nat(endpoints([1.0] * 2), backend_subnet="198.18.0.0/24"),
    "nat-17": lambda: ruleset.nat(endpoints([1.0] * 17)),
    "filter-1": lambda: ruleset.filters(endpoints([1.0])),
    "filter-2": lambda: ruleset.filters(endpoints([1.0] * 2)),
    "mangle": ruleset.mangle,
    "mangle-without-marks": lambda: ruleset.mangle(marks=False),
    "raw": ruleset.raw,
    "nat-2-check": lambda: ruleset.nat(endpoints([1.0] * 2), check_source=CHECKER),
    "mangle-check": lambda: ruleset.mangle(CHECKER),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_text_for_an_empty_kernel_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    text, golden = ruleset.restore(TABLES[name](), Listing()), GOLDEN / f"{name}.rules"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_golden_file_belongs_to_a_test() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(TABLES)


# -- shares ----------------------------------------------------------------------------------------------------------


@given(ANY)
def test_every_backend_gets_its_weight_over_the_sum_of_all(rotation: list[Endpoint]) -> None:
    total = sum(backend.weight for backend in rotation)
    reached = shares(applied(rotation))
    for backend in rotation:
        wanted = backend.weight / total if total else 1 / len(rotation)
        assert reached.get(backend.ip, 0.0) == pytest.approx(wanted, abs=1e-6)


@given(EQUAL)
def test_equal_weights_give_each_of_n_backends_exactly_one_nth(rotation: list[Endpoint]) -> None:
    reached = shares(applied(rotation))
    assert reached == pytest.approx({backend.ip: 1 / len(rotation) for backend in rotation}, abs=1e-8)


@given(ANY)
def test_a_backend_without_weight_gets_nothing_unless_no_backend_has_any(rotation: list[Endpoint]) -> None:
    reached, weighty = shares(applied(rotation)), {b.ip for b in rotation if b.weight > 0}
    assert set(reached) == (weighty or {b.ip for b in rotation})


@pytest.mark.parametrize("weights", [(1.0, 1e-17, 1e-17), (1e20, 1.0, 1.0), (1e-17, 1.0, 1e-17, 1e-17)])
def test_only_ratios_matter_however_far_apart_the_weights_are(weights: tuple[float, ...]) -> None:
    rotation = endpoints(weights)
    reached = shares(applied(rotation))
    assert reached == pytest.approx({b.ip: b.weight / sum(weights) for b in rotation}, abs=1e-6)


@pytest.mark.parametrize(("count", "depth"), [(8, 0), (9, 1), (32, 1), (100, 2), (1000, 4)])
def test_a_new_connection_passes_few_rules_however_many_backends(count: int, depth: int) -> None:
    dispatch = ruleset.dispatch(endpoints([1.0] * count))
    assert max(len(rules) for rules in dispatch.values()) <= 8
    assert max(len(chain.removeprefix("LB-T-")) for chain in {*dispatch, "LB-T-"} - {"LB-DISPATCH"}) == depth


# -- the step from one state to the next -----------------------------------------------------------------------------


@given(STEPS)
def test_there_is_nothing_to_do_once_a_text_has_been_applied(fleets: list[list[Endpoint]]) -> None:
    kernel = FakeNetfilter()
    kernel.make_sets()
    for rotation in fleets:
        for table in ruleset.tables(rotation):
            put(kernel, table)
            assert ruleset.restore(table, listing(kernel, table.name)) == ""


@given(STEPS)
def test_a_step_from_any_rotation_ends_where_a_fresh_start_does(fleets: list[list[Endpoint]]) -> None:
    kernel, fresh = FakeNetfilter(), FakeNetfilter()
    for rotation in fleets:
        put(kernel, ruleset.nat(rotation))
    put(fresh, ruleset.nat(fleets[-1]))
    assert listing(kernel).chains == listing(fresh).chains


@given(STEPS)
def test_chains_that_are_not_ours_are_only_ever_led_from(fleets: list[list[Endpoint]]) -> None:
    kernel = FakeNetfilter()
    kernel.make_sets()
    for rotation in fleets:
        text = "".join(put(kernel, table) for table in ruleset.tables(rotation, check_source=CHECKER))
        for line in text.splitlines():
            word, _, rest = line.partition(" ")
            chain = word[1:] if word.startswith(":") else rest.split(" ")[0]
            jump = re.search(r" -j (\S+)", line)
            assert (
                chain.startswith("LB-")
                or word in ("*nat", "*filter", "*mangle", "*raw", "COMMIT")
                or (word in ("-I", "-D") and chain in HOOKS and jump and jump[1].startswith("LB-"))
            ), line
            assert not jump or jump[1].startswith("LB-") or jump[1] in TARGETS, line
    for chain, rules in DOCKERS.items():
        assert set(rules) <= set(kernel.rules("nat", chain))


@given(STEPS, st.data())
def test_a_known_backend_keeps_its_chain_and_its_counter(fleets: list[list[Endpoint]], data: st.DataObject) -> None:
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(fleets[0]))
    for before, after in pairwise(fleets):
        draining = [b for b in before if b not in after and data.draw(st.booleans())]
        staying = {b.ip for b in before} & {b.ip for b in (*after, *draining)}
        for ip in staying:
            kernel.count(ip, 7)
        counted = connections(listing(kernel))
        text = put(kernel, ruleset.nat(after, draining))
        assert not [ip for ip in staying if f":LB-B-{ip} " in text]
        assert connections(listing(kernel)) == {
            b.ip: counted[b.ip] if b.ip in staying else 0 for b in (*after, *draining)
        }
        put(kernel, ruleset.nat(after))


@given(ANY)
def test_a_chain_name_never_exceeds_what_iptables_takes(rotation: list[Endpoint]) -> None:
    assert max(len(chain) for chain in ruleset.nat(rotation).chains) <= 28


@given(st.integers(0, 199), st.sampled_from([0.0, 0.25, 0.999, 1.0, 4.0, 100.0]))
def test_one_new_weight_among_200_touches_only_the_chains_on_its_path(which: int, weight: float) -> None:
    before = endpoints([1.0] * 200)
    after = [Endpoint(b.ip, b.port, weight if i == which else b.weight) for i, b in enumerate(before)]
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(before))
    above = {target: chain for chain, rules in listing(kernel).chains.items() for _, target in jumps(rules)}
    path = [f"LB-B-{before[which].ip}"]
    while path[-1] in above:
        path.append(above[path[-1]])
    touched = set(re.findall(r"^:(\S+)", put(kernel, ruleset.nat(after)), re.MULTILINE))
    assert touched <= set(path[1:])
    assert ("LB-DISPATCH" in touched) == (weight != 1.0)


def _without(table: str, chain: str) -> Callable[[FakeNetfilter], None]:
    return lambda kernel: kernel.tables[table][chain].clear()


FOREIGN = 0, "-p tcp -m tcp --dport 8000 -j DNAT --to-destination 198.18.9.9:80"
VANDALS: dict[str, Callable[[FakeNetfilter], object]] = {
    "dispatch flushed": _without("nat", "LB-DISPATCH"),
    "hook gone": _without("nat", "PREROUTING"),
    "a backend's chain flushed": _without("nat", "LB-B-198.18.0.3"),
    "a chain of ours too many": lambda kernel: kernel.tables["nat"].update({"LB-B-198.18.0.77": [(3, "-j DROP")]}),
    "a foreign rule before the hook": lambda kernel: kernel.tables["nat"]["PREROUTING"].insert(0, FOREIGN),
    "the hook twice": lambda kernel: kernel.tables["nat"]["PREROUTING"].append(kernel.tables["nat"]["PREROUTING"][0]),
    "a hook of another version": lambda kernel: kernel.tables["nat"]["PREROUTING"].insert(0, (0, "-j LB-DISPATCH")),
    "a rule too many": lambda kernel: kernel.tables["nat"]["LB-DISPATCH"].insert(0, (0, "-j RETURN")),
}


@pytest.mark.parametrize("vandal", VANDALS)
def test_what_somebody_else_changed_is_put_back(vandal: str) -> None:
    kernel, table = FakeNetfilter(), ruleset.nat(endpoints([1.0, 2.0, 3.0]))
    put(kernel, table)
    whole = listing(kernel).chains
    VANDALS[vandal](kernel)
    assert listing(kernel).chains != whole
    assert put(kernel, table)
    ours = dict(listing(kernel).chains)
    ours["PREROUTING"] = tuple(rule for rule in ours["PREROUTING"] if rule != FOREIGN[1])
    assert ours == whole
    assert kernel.rules("nat", "PREROUTING")[0].endswith("-j LB-DISPATCH")
    assert put(kernel, table) == ""


# -- the sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "present", "text"),
    [
        ("", "", ""),
        ("ab", "ab", ""),
        ("ab", "a", "add LB-BACKENDS b\n"),
        ("a", "ab", "del LB-BACKENDS b\n"),
        ("ca", "bd", "add LB-BACKENDS a\nadd LB-BACKENDS c\ndel LB-BACKENDS b\ndel LB-BACKENDS d\n"),
    ],
)
def test_the_set_changes_by_its_differences_and_never_adds_a_member_again(wanted: str, present: str, text: str) -> None:
    assert ruleset.set_changes(wanted, present) == text


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_dockers_rules_may_stand_before_ours() -> None:
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(endpoints([1.0])))
    rules = kernel.tables["nat"]["POSTROUTING"]
    rules.sort(key=lambda rule: "DOCKER" not in rule[1])  # as Docker leaves it when it writes its rules anew
    assert rules[0][1].endswith("DOCKER_POSTROUTING")
    assert put(kernel, ruleset.nat(endpoints([1.0]))) == ""


def test_the_hook_moves_in_one_step() -> None:
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(endpoints([1.0])))
    kernel.tables["nat"]["PREROUTING"].insert(0, FOREIGN)
    hook = kernel.rules("nat", "PREROUTING")[1]
    text = put(kernel, ruleset.nat(endpoints([1.0])))
    assert text == f"*nat\n-D PREROUTING {hook}\n-I PREROUTING 1 {hook}\nCOMMIT\n"


def test_without_a_check_source_its_rules_go_again() -> None:
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(endpoints([1.0] * 3), check_source=CHECKER))
    assert [rule.split()[-1] for rule in kernel.rules("nat", "PREROUTING")] == ["LB-CHECK", "LB-DISPATCH"]
    put(kernel, ruleset.nat(endpoints([1.0] * 3)))
    assert [rule.split()[-1] for rule in kernel.rules("nat", "PREROUTING")] == ["LB-DISPATCH"]
    assert "LB-CHECK" not in kernel.tables["nat"]


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_self_checks_are_spread_equally_over_at_most_eight_backends(count: int) -> None:
    rules = ruleset.nat(endpoints([1.0, *[3.0] * (count - 1)]), check_source=CHECKER).chains["LB-CHECK"]
    arriving, shares = 1.0, []
    for rule in rules:
        chance = re.search(r"--probability (\S+)", rule)
        shares.append(arriving * (float(chance[1]) if chance else 1.0))
        arriving -= shares[-1]
    assert shares == pytest.approx([1 / min(count, 8)] * min(count, 8), abs=1e-8)


def test_a_kernel_that_lacks_features_gets_only_what_it_can_do() -> None:
    tables = ruleset.tables(endpoints([1.0] * 2), features=Features(marks=False, retries=False, notrack=False))
    names = [table.name for table in tables]
    text = "".join(ruleset.restore(table, Listing()) for table in tables)
    assert names == ["nat", "filter", "mangle"]
    assert "LB-BACKENDS dst" in text
    assert not re.search("connmark|CONNMARK|connbytes|notrack|LB-REPLIES", text)


@pytest.mark.parametrize(
    ("vandal", "hooked"),
    [
        (lambda kernel: None, True),
        (lambda kernel: kernel.tables["nat"]["PREROUTING"].clear(), False),
        (lambda kernel: kernel.tables["nat"].pop("LB-DISPATCH"), False),
    ],
)
def test_whether_new_connections_are_led_to_us_is_seen_in_the_listing(
    vandal: Callable[[FakeNetfilter], object], hooked: bool
) -> None:
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat([]))
    vandal(kernel)
    assert ruleset.is_hooked(listing(kernel)) == hooked
