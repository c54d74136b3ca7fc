"""The text of the rules: exact for a few fleets, and its guarantees for any."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import restore
import ruleset
from datapath import DataPath
from fakes_netfilter import DOCKERS, FakeNetfilter
from features import OPTIONAL
from listings import Listing, connections, parse_table
from restore import Chains, Table
from ruleset import Endpoint

GOLDEN = Path(__file__).parent / "golden"
HOOKS = ("PREROUTING", "POSTROUTING", "INPUT", "FORWARD", "OUTPUT")
TARGETS = ("DNAT", "MASQUERADE", "DROP", "RETURN", "CONNMARK", "CT")
CHECKER = "198.18.0.1"
HOST = DataPath(prefix="LB-0a1b2c-", bridge="br-0123456789ab", subnet="198.18.0.0/20")


def endpoints(weights: Sequence[float], first: str = "198.18.0.2") -> list[Endpoint]:
    return [Endpoint(str(IPv4Address(first) + i), weight) for i, weight in enumerate(weights)]


def weighted(weight: st.SearchStrategy[float]) -> st.SearchStrategy[list[Endpoint]]:
    """Fleets with consecutive addresses, as Docker assigns them, and fleets with any addresses."""
    last = 2**32 - 1
    scattered = st.lists(st.integers(0, last), unique=True, max_size=40)
    in_a_row = st.builds(lambda first, n: list(range(first, first + n)), st.integers(0, last - 40), st.integers(0, 40))

    def with_weights(numbers: list[int]) -> st.SearchStrategy[list[Endpoint]]:
        weights = st.lists(weight, min_size=len(numbers), max_size=len(numbers))
        addresses = [str(IPv4Address(number)) for number in numbers]
        return weights.map(lambda ws: [Endpoint(ip, w) for ip, w in zip(addresses, ws, strict=True)])

    return (scattered | in_a_row).flatmap(with_weights)


EQUAL = weighted(st.just(1.0))
ANY = weighted(st.floats(0.001, 1000.0))
# Some states of one address range: backends are added, removed and weighted otherwise.
STEPS = st.lists(
    st.dictionaries(st.integers(2, 40), st.sampled_from([0.25, 0.5, 1.0, 3.0]), max_size=30).map(
        lambda fleet: [Endpoint(f"198.18.0.{number}", weight) for number, weight in fleet.items()]
    ),
    min_size=2,
    max_size=4,
)


def listing(kernel: FakeNetfilter, table: str = "nat") -> Listing:
    return parse_table(kernel.table(table))


def put(kernel: FakeNetfilter, table: Table) -> str:
    """Applies `table` to the kernel, and returns the text."""
    text = restore.restore(table, listing(kernel, table.name))
    kernel.apply(text)
    return text


def jumps(rules: Sequence[str]) -> list[tuple[float, str]]:
    found = [re.fullmatch(r"(?:-m statistic --mode random --probability (\S+) )?-j (LB-\S+)", rule) for rule in rules]
    return [(float(match[1] or 1), match[2]) for match in found if match]


def shares(chains: Chains, chain: str = "LB-DISPATCH", arriving: float = 1.0) -> dict[str, float]:
    """The part of all new connections that each backend gets, computed along the rules that a packet passes."""
    reached: dict[str, float] = {}
    assert len(jumps(chains[chain])) == len(chains[chain])
    for chance, target in jumps(chains[chain]):
        taken, arriving = arriving * chance, arriving * (1 - chance)
        if target.startswith("LB-B-"):
            reached[target.removeprefix("LB-B-")] = taken
        else:
            reached |= shares(chains, target, taken)
    assert arriving == 0 or not chains[chain]  # every packet has a target
    return reached


def applied(rotation: Sequence[Endpoint]) -> Chains:
    """The chains of a kernel after `rotation` was applied."""
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(rotation))
    return dict(listing(kernel).chains)


# -- exact text ------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], Table]] = {
    "nat-1": lambda: ruleset.nat(endpoints([1.0])),
    "nat-2": lambda: ruleset.nat(endpoints([1.0] * 2)),
    "nat-3": lambda: ruleset.nat(endpoints([1.0] * 3)),
    "nat-5": lambda: ruleset.nat(endpoints([1.0] * 5)),
    "nat-17": lambda: ruleset.nat(endpoints([1.0] * 17)),
    "filter-1": lambda: ruleset.filters(retries=False),
    "filter-2": ruleset.filters,
    "filter-without-marks": lambda: ruleset.filters(marks=False),
    "raw": ruleset.raw,
    "nat-2-check": lambda: ruleset.nat(endpoints([1.0] * 2), check_source=CHECKER),
    "nat-2-ports": lambda: ruleset.nat(endpoints([1.0] * 2), path=DataPath(((8000, 8080), (8001, 8443)))),
    "nat-2-sticky": lambda: ruleset.nat(endpoints([1.0] * 2), [Endpoint("198.18.0.4")], DataPath(sticky=60)),
    "nat-2-host": lambda: ruleset.nat(endpoints([1.0] * 2), path=HOST, check_source=CHECKER),
    "filter-2-host": lambda: ruleset.tables(endpoints([1.0] * 2), path=HOST, check_source=CHECKER)[1],
    "filter-check": lambda: ruleset.filters(check_source=CHECKER),
}


@pytest.mark.parametrize("name", TABLES)
def test_text_for_an_empty_kernel_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    text, golden = restore.restore(TABLES[name](), Listing()), GOLDEN / f"{name}.rules"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_golden_file_belongs_to_a_test() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(TABLES)


# -- shares ----------------------------------------------------------------------------------------------------------


@given(ANY)
def test_share_is_the_weight_over_the_sum_of_weights(rotation: list[Endpoint]) -> None:
    total = sum(backend.weight for backend in rotation)
    reached = shares(applied(rotation))
    for backend in rotation:
        assert reached[backend.ip] == pytest.approx(backend.weight / total, abs=1e-6)


@given(EQUAL)
def test_equal_weights_give_each_of_n_backends_exactly_one_nth(rotation: list[Endpoint]) -> None:
    reached = shares(applied(rotation))
    assert reached == pytest.approx({backend.ip: 1 / len(rotation) for backend in rotation}, abs=1e-8)


@pytest.mark.parametrize("weights", [(1.0, 1e-17, 1e-17), (1e20, 1.0, 1.0), (1e-17, 1.0, 1e-17, 1e-17)])
def test_only_ratios_of_weights_matter(weights: tuple[float, ...]) -> None:
    rotation = endpoints(weights)
    reached = shares(applied(rotation))
    assert reached == pytest.approx({b.ip: b.weight / sum(weights) for b in rotation}, abs=1e-6)


@pytest.mark.parametrize(("count", "depth"), [(8, 0), (9, 1), (32, 1), (100, 2), (1000, 4)])
def test_new_connection_passes_few_rules_with_any_number_of_backends(count: int, depth: int) -> None:
    dispatch = ruleset.dispatch(endpoints([1.0] * count))
    assert max(len(rules) for rules in dispatch.values()) <= 8
    assert max(len(chain.removeprefix("LB-T-")) for chain in {*dispatch, "LB-T-"} - {"LB-DISPATCH"}) == depth


# -- the step from one state to the next -----------------------------------------------------------------------------


@given(STEPS)
def test_applied_text_leaves_nothing_to_change(fleets: list[list[Endpoint]]) -> None:
    kernel = FakeNetfilter()
    kernel.make_sets()
    for rotation in fleets:
        for table in ruleset.tables(rotation):
            put(kernel, table)
            assert restore.restore(table, listing(kernel, table.name)) == ""


@given(STEPS)
def test_rules_do_not_depend_on_earlier_rotations(fleets: list[list[Endpoint]]) -> None:
    kernel, fresh = FakeNetfilter(), FakeNetfilter()
    for rotation in fleets:
        put(kernel, ruleset.nat(rotation))
    put(fresh, ruleset.nat(fleets[-1]))
    assert listing(kernel).chains == listing(fresh).chains


@given(STEPS)
def test_foreign_chains_only_get_hooks(fleets: list[list[Endpoint]]) -> None:
    kernel = FakeNetfilter()
    kernel.make_sets()
    for rotation in fleets:
        text = "".join(put(kernel, table) for table in ruleset.tables(rotation, check_source=CHECKER))
        for line in text.splitlines():
            command, _, rest = line.partition(" ")
            chain = command[1:] if command.startswith(":") else rest.split(" ")[0]
            jump = re.search(r" -j (\S+)", line)
            assert (
                chain.startswith("LB-")
                or command in ("*nat", "*filter", "*raw", "COMMIT")
                or (command in ("-I", "-D") and chain in HOOKS and jump and jump[1].startswith("LB-"))
            ), line
            assert not jump or jump[1].startswith("LB-") or jump[1] in TARGETS, line
    for chain, rules in DOCKERS.items():
        assert set(rules) <= set(kernel.rules("nat", chain))


@given(STEPS, st.data())
def test_known_backend_keeps_its_chain_and_its_counter(fleets: list[list[Endpoint]], data: st.DataObject) -> None:
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
def test_chain_names_are_short_enough_for_iptables(rotation: list[Endpoint]) -> None:
    assert max(len(chain) for chain in ruleset.nat(rotation).chains) <= 28


@given(st.integers(0, 199), st.sampled_from([0.25, 0.999, 1.0, 4.0, 100.0]))
def test_new_weight_among_200_changes_only_the_chains_on_its_path(which: int, weight: float) -> None:
    before = endpoints([1.0] * 200)
    after = [Endpoint(b.ip, weight if i == which else b.weight) for i, b in enumerate(before)]
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
DAMAGE: dict[str, Callable[[FakeNetfilter], object]] = {
    "dispatch flushed": _without("nat", "LB-DISPATCH"),
    "hook deleted": _without("nat", "PREROUTING"),
    "a backend's chain flushed": _without("nat", "LB-B-198.18.0.3"),
    "an additional chain of ours": lambda kernel: kernel.tables["nat"].update({"LB-B-198.18.0.77": [(3, "-j DROP")]}),
    "a foreign rule before the hook": lambda kernel: kernel.tables["nat"]["PREROUTING"].insert(0, FOREIGN),
    "the hook twice": lambda kernel: kernel.tables["nat"]["PREROUTING"].append(kernel.tables["nat"]["PREROUTING"][0]),
    "a hook of another version": lambda kernel: kernel.tables["nat"]["PREROUTING"].insert(0, (0, "-j LB-DISPATCH")),
    "an additional rule": lambda kernel: kernel.tables["nat"]["LB-DISPATCH"].insert(0, (0, "-j RETURN")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_changes_by_other_programs_are_reverted(damage: str) -> None:
    kernel, table = FakeNetfilter(), ruleset.nat(endpoints([1.0, 2.0, 3.0]))
    put(kernel, table)
    intact = listing(kernel).chains
    DAMAGE[damage](kernel)
    assert listing(kernel).chains != intact
    assert put(kernel, table)
    ours = dict(listing(kernel).chains)
    ours["PREROUTING"] = tuple(rule for rule in ours["PREROUTING"] if rule != FOREIGN[1])
    assert ours == intact
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
def test_present_members_of_a_set_are_not_added_again(wanted: str, present: str, text: str) -> None:
    assert restore.set_changes(wanted, present, "LB-BACKENDS") == text


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_dockers_rules_may_stand_before_ours() -> None:
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(endpoints([1.0])))
    rules = kernel.tables["nat"]["POSTROUTING"]
    rules.sort(key=lambda rule: "DOCKER" not in rule[1])  # as after Docker rewrites its rules
    assert rules[0][1].endswith("DOCKER_POSTROUTING")
    assert put(kernel, ruleset.nat(endpoints([1.0]))) == ""


def test_hook_is_moved_in_one_step() -> None:
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat(endpoints([1.0])))
    kernel.tables["nat"]["PREROUTING"].insert(0, FOREIGN)
    hook = kernel.rules("nat", "PREROUTING")[1]
    text = put(kernel, ruleset.nat(endpoints([1.0])))
    assert text == f"*nat\n-D PREROUTING {hook}\n-I PREROUTING 1 {hook}\nCOMMIT\n"


def test_rules_of_self_checks_are_removed_with_their_source() -> None:
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


def test_tables_do_not_use_missing_features() -> None:
    tables = ruleset.tables(endpoints([1.0] * 2), missing=OPTIONAL)
    names = [table.name for table in tables]
    text = "".join(restore.restore(table, Listing()) for table in tables)
    assert names == ["nat", "filter"]
    assert "LB-BACKENDS dst" in text
    assert not re.search("connmark|CONNMARK|connbytes|notrack|LB-REPLIES", text)


@pytest.mark.parametrize(
    ("damage", "hooked"),
    [
        (lambda kernel: None, True),
        (lambda kernel: kernel.tables["nat"]["PREROUTING"].clear(), False),
        (lambda kernel: kernel.tables["nat"].pop("LB-DISPATCH"), False),
    ],
)
def test_listing_without_hook_or_dispatch_chain_is_not_hooked(
    damage: Callable[[FakeNetfilter], object], hooked: bool
) -> None:
    kernel = FakeNetfilter()
    put(kernel, ruleset.nat([]))
    damage(kernel)
    assert ruleset.is_hooked(listing(kernel)) == hooked
