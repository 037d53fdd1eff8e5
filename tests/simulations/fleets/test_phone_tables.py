"""The tables: they hold what they sum up, and a command makes them again."""

import json

import pytest

from simulations.fleets.phone_tables import (
    FOLDER,
    LINKS,
    PHONES,
    RAW_LINKS,
    RAW_PHONES,
    main,
    measured_links,
    phone_groups,
    phone_groups_of,
)


def listed(ram, *scores):
    return [
        {"RAM": ram, "CPU_F_AI_Score": str(score), "Model": "x"} for score in scores
    ]


def test_the_table_of_phones_stands_for_all_that_were_listed():
    groups = phone_groups()

    assert sum(group.num_phones for group in groups) == 333
    assert len({group.ram_gb for group in groups}) == 11
    assert sum(g.num_phones for g in groups if g.ram_gb == 4) == 96
    assert max(group.float_score for group in groups) < 4310  # the fastest one listed
    assert min(group.float_score for group in groups) > 105


def test_the_table_of_links_has_nineteen():
    assert len(measured_links()) == 19
    assert measured_links()[-1].down_mean == 17332.7


def test_groups_are_quantiles_of_speed_for_each_amount_of_memory():
    groups = phone_groups_of(listed("4GB", *range(16, 0, -1)) + listed("0.5GB", 7, 9))

    assert [(g.ram_gb, g.float_score, g.num_phones) for g in groups] == [
        (0.5, 8.0, 2),
        (4.0, 2.5, 4),
        (4.0, 6.5, 4),
        (4.0, 10.5, 4),
        (4.0, 14.5, 4),
    ]


def test_the_command_writes_both_tables(tmp_path):
    link = {"down_u": 20.04, "down_sigma": 3, "up_u": 7.15, "up_sigma": 2}
    (tmp_path / RAW_PHONES).write_text(json.dumps(listed("1GB", 5, 8)))
    (tmp_path / RAW_LINKS).write_text(json.dumps({"someone": link}))

    main(tmp_path, out=tmp_path)

    assert (tmp_path / PHONES).read_text() == (
        "ram_gb,float_score,num_phones\n1,6.5,2\n"
    )
    assert (tmp_path / LINKS).read_text() == (
        "down_mean,down_deviation,up_mean,up_deviation\n20,3,7.2,2\n"
    )


@pytest.mark.parametrize("name", [PHONES, LINKS, "LICENSE-FLASH.md"])
def test_the_tables_come_with_their_licence(name):
    assert (FOLDER / name).stat().st_size > 100
