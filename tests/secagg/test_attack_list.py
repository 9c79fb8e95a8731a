"""The attacks that the design names, and the test that holds each: forty numbered cases, and some without a number."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.secagg

TESTS = Path(__file__).parents[1]
DEVICE, ROSTER, SERVER, DROP_OUT = (
    f"secagg/test_attacks_{part}.py" for part in ("device", "roster", "server", "drop_out")
)
MACHINES, VECTOR = "secagg/test_machines.py", "secagg/test_vector.py"
UPLOADS, ROUNDS = "coordinator/test_secure_uploads.py", "coordinator/test_secure_rounds.py"

#: Number of the case: file under ``tests``, and test. A second line says what holds the other side of a case.
CASES = {
    1: [(MACHINES, "test_drop_out_in_one_stage"), (ROUNDS, "test_devices_that_leave_in_a_stage_are_survived")],
    2: [(MACHINES, "test_drop_out_in_every_stage"), (ROUNDS, "test_devices_that_leave_in_every_stage_at_once")],
    3: [(SERVER, "test_case_03_exactly_t_holders_then_one_fewer")],
    4: [(SERVER, "test_case_04_survivors_one_below_n_min")],
    5: [(DEVICE, "test_case_05_both_kinds_of_share_requested")],
    6: [(DEVICE, "test_case_06_two_survivor_sets_to_two_devices")],
    7: [
        (DEVICE, "test_case_07_survivor_set_signed_twice_across_a_restart"),
        ("client/test_secure_secrets.py", "test_a_process_that_dies_in_a_stage_has_left_its_cohort_for_good"),
    ],
    8: [
        (DEVICE, "test_case_08_fewer_than_q_or_duplicated_signers"),
        (DEVICE, "test_case_08_a_signer_that_is_no_survivor"),
        (DROP_OUT, "test_forged_signatures_in_a_large_quorum_that_hope_to_be_missed"),
    ],
    9: [
        (DEVICE, "test_case_09_neighbours_told_dropped_device_told_alive"),
        (DROP_OUT, "test_a_device_is_told_that_few_shared_and_the_others_that_just_those_dropped_out"),
        (DROP_OUT, "test_two_devices_are_told_that_besides_them_only_those_shared_who_dropped_out"),
    ],
    10: [(ROSTER, "test_case_10_two_rosters")],
    11: [
        (ROSTER, "test_case_11_wrong_graph_or_neighbour_list"),
        (DEVICE, "test_case_11_a_delivery_of_other_neighbours"),
    ],
    12: [
        (ROSTER, "test_case_12_keys_substituted_by_the_server"),
        (ROSTER, "test_case_12_a_member_signed_by_the_server_itself"),
    ],
    13: [
        (ROSTER, "test_case_13_revoked_or_expired_certificate"),
        (SERVER, "test_case_13_a_certificate_that_does_not_hold_is_turned_away"),
        ("coordinator/test_device_protocol.py", "test_a_revoked_device_is_refused_and_its_place_is_free"),
    ],
    14: [(ROSTER, "test_case_14_one_identity_twice"), (SERVER, "test_case_14_one_identity_twice")],
    15: [(ROSTER, "test_case_15_replay_from_an_earlier_round"), (SERVER, "test_messages_of_another_session")],
    16: [(ROSTER, "test_case_16_replay_from_an_earlier_attempt"), (SERVER, "test_messages_of_another_session")],
    17: [(ROSTER, "test_case_17_other_model_digest"), (SERVER, "test_messages_of_another_session")],
    18: [
        (ROSTER, "test_case_18_low_order_point"),
        (ROSTER, "test_case_18_low_order_mask_key"),
        (ROSTER, "test_case_18_point_that_is_not_canonical"),
        (ROSTER, "test_case_18_points_on_the_twist_agree_as_others_do"),
        (SERVER, "test_case_18_low_order_points_are_turned_away"),
    ],
    19: [(ROSTER, "test_case_19_own_key_missing_or_duplicated")],
    20: [
        (ROSTER, "test_case_20_duplicate_peer_keys"),
        (SERVER, "test_case_20_duplicate_peer_keys_are_turned_away"),
    ],
    21: [(DEVICE, "test_case_21_ciphertext_rerouted")],
    22: [(DEVICE, "test_case_22_bit_flip_in_ciphertext_or_tag")],
    23: [(SERVER, "test_case_23_corrupt_share"), (MACHINES, "test_a_corrupt_share_is_left_out_and_its_sender_blamed")],
    24: [(SERVER, "test_case_24_duplicate_x_coordinates")],
    25: [
        (DEVICE, "test_case_25_x_of_zero_or_a_share_of_p_or_more"),
        (SERVER, "test_case_25_share_of_p_or_more"),
    ],
    26: [
        (UPLOADS, "test_case_26_chunk_missing_repeated_reordered_short"),
        ("coordinator/test_device_protocol.py", "test_chunks_may_repeat_but_not_leave_gaps_overlap_or_lie"),
    ],
    27: [(UPLOADS, "test_case_27_disconnect_in_mid_vector")],
    28: [(UPLOADS, "test_case_28_late_vector"), (SERVER, "test_case_28_late_vector")],
    29: [
        (UPLOADS, "test_case_29_two_vectors_from_one_device"),
        (SERVER, "test_case_29_two_vectors_from_one_device"),
    ],
    30: [
        (VECTOR, "test_lane_overflow_at_n_max"),
        (VECTOR, "test_one_device_more_than_n_max_is_refused"),
        ("secagg/test_parameters.py", "test_more_members_than_the_plan_allows_are_refused"),
    ],
    31: [
        (VECTOR, "test_nan_inf_and_overflow_never_leave_the_device"),
        (VECTOR, "test_a_delta_over_the_clip_norm_is_clipped_and_not_within"),
    ],
    32: [(VECTOR, "test_a_weight_over_the_largest_is_refused")],
    33: [
        (VECTOR, "test_a_count_that_differs_from_the_survivors_is_refused"),
        (ROUNDS, "test_a_cohort_whose_count_does_not_add_up_is_thrown_away"),
    ],
    34: [
        (DEVICE, "test_case_34_thresholds_lowered_by_the_coordinator"),
        ("client/test_secure_hostile.py", "test_a_plan_without_security_is_not_even_trained"),
        ("client/test_secure_hostile.py", "test_least_survivors_is_the_devices_own_choice"),
    ],
    35: [
        (
            "coordinator/test_secure_kill.py",
            "test_a_kill_at_every_line_that_matters_keeps_the_sum_and_the_secrets",
        ),
        (ROUNDS, "test_a_coordinator_that_restarts_in_a_stage_goes_on_with_the_same_cohort"),
    ],
    36: [
        (SERVER, "test_case_36_survivors_below_n_min_with_discrete_noise"),
        ("coordinator/test_privacy_distributed.py", "test_the_smallest_sum_is_noised_as_the_plan_promises"),
    ],
    37: [
        (MACHINES, "test_every_call_out_of_turn_ends_the_attempt_and_forgets_the_secrets"),
        (MACHINES, "test_messages_out_of_turn_and_late_ones_change_nothing"),
    ],
    38: [(DEVICE, "test_case_38_no_keystream_is_used_twice")],
    39: [
        (MACHINES, "test_secrets_leave_a_machine_by_no_back_door"),
        (SERVER, "test_case_39_secrets_in_no_error_and_no_repr"),
        ("client/test_secure_secrets.py", "test_events_and_outcomes_hold_no_secret"),
        ("coordinator/test_secure_view.py", "test_no_plain_value_was_sent_or_stored"),
    ],
    40: [
        (DEVICE, "test_case_40_the_same_cohort_minus_one_run_again"),
        ("client/test_secure_hostile.py", "test_a_spent_update_joins_no_other_cohort"),
        ("client/test_secure_hostile.py", "test_an_older_round_is_never_joined_again"),
    ],
}

FURTHER = {
    "messages of another task": (ROSTER, "test_messages_of_another_task"),
    "a device that advertises another's key": (SERVER, "test_a_device_that_advertises_the_key_of_another"),
    "fields of wrong length, from devices": (SERVER, "test_wrong_length_fields"),
    "fields of wrong length, from the coordinator": (DEVICE, "test_answers_of_wrong_length"),
    "members' fields of wrong length": (ROSTER, "test_members_fields_of_wrong_length"),
    "shares that do not match the commitment": (SERVER, "test_shares_that_do_not_match_the_commitment"),
    "inconsistent ciphertexts": (
        SERVER,
        "test_inconsistent_ciphertexts_are_blamed_and_excluded_from_the_next_attempt",
    ),
    "more identities than an enrolment allows": (UPLOADS, "test_a_token_of_n_uses_enrols_n_identities"),
    "a survivor that never shared": (DROP_OUT, "test_a_survivor_that_never_shared"),
    "survivors that leave a device alone": (DROP_OUT, "test_survivors_that_leave_a_device_too_few_neighbours"),
    "a member that frames a holder": (DROP_OUT, "test_a_share_that_was_dealt_wrong_frames_nobody_out_of_the_sum"),
    "t - 1 that collude": (DEVICE, "test_fewer_than_the_threshold_see_random_bytes"),
}


def test_every_case_has_a_test() -> None:
    assert sorted(CASES) == list(range(1, 41)) and all(CASES.values())


def test_every_test_that_is_named_is_there_and_runs() -> None:
    named = [where for tests in CASES.values() for where in tests] + list(FURTHER.values())
    trees = {file: ast.parse((TESTS / file).read_text()) for file, _ in named}
    missing = [(file, test) for file, test in named if test not in functions_that_run(trees[file])]
    assert missing == []


def functions_that_run(tree: ast.Module) -> set[str]:
    """Test functions of a file that no decorator skips."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not any("skip" in ast.dump(mark) for mark in node.decorator_list)
    }
