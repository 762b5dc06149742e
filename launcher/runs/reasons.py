"""reasons: Slurm's states and reasons in plain words; Slurm's own word is always shown beside them."""

from __future__ import annotations

_STATES = {
    "PENDING": "waits in the queue",
    "CONFIGURING": "has its nodes, which are being made ready",
    "RUNNING": "runs",
    "COMPLETING": "has ended; its nodes are being cleaned up",
    "SUSPENDED": "is suspended by Slurm and will go on",
    "REQUEUED": "goes back to the queue and will run again",
    "REQUEUE_HOLD": "was requeued and is held; release it with: scontrol release {job_id}",
    "SPECIAL_EXIT": "was requeued and is held; release it with: scontrol release {job_id}",
    "STOPPED": "is paused with its nodes kept",
    "BOOT_FAIL": "could not start because its nodes did not boot",
    "CANCELLED": "was cancelled",
    "COMPLETED": "ended without an error status",
    "DEADLINE": "could not be finished before its deadline",
    "FAILED": "failed",
    "NODE_FAIL": "lost a node",
    "OUT_OF_MEMORY": "ran out of the host memory it asked for",
    "PREEMPTED": "was ended to make room for a job of higher priority",
    "REVOKED": "was taken over by another cluster",
    "TIMEOUT": "was ended at its time limit",
}
_PENDING = {
    "Priority": "other jobs come first; it starts when they have",
    "Resources": "it is next; the nodes it needs are still busy",
    "PartitionTimeLimit": "its time limit is over the partition's, so it will never start: set slurm.time",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives, so it will never start: set slurm.nodes",
    "PartitionConfig": "the partition can never give what it asks for: cancel it and ask for less",
    "PartitionDown": "the partition is down; it starts when the administrators bring it up",
    "PartitionInactive": "the partition does not start jobs now",
    "BadConstraints": "no node has what it asks for, so it will never start: look at slurm.constraint",
    "NodeDown": "a node it needs is down",
    "BeginTime": "it was put back; Slurm waits a moment before it starts it again",
    "Dependency": "it waits for another job to end",
    "DependencyNeverSatisfied": "the job it depends on failed, so it will never start: cancel it",
    "JobHeldUser": "you hold it; release it with: scontrol release {job_id}",
    "JobHeldAdmin": "an administrator holds it; ask them",
    "Licenses": "it waits for a licence",
    "Reservation": "it waits for its reservation to begin",
    "ReservationDeleted": "its reservation was deleted, so it will never start",
    "InvalidAccount": "its account is not valid: cancel it and set slurm.account",
    "InvalidQOS": "its QOS is not valid: cancel it and set slurm.qos",
    "NonZeroExitCode": "its last start failed",
    "launch_failed_requeued_held": "its start failed and it is held; release it with: scontrol release {job_id}",
    "Cleaning": "its last start is still being cleaned up",
    "None": "Slurm has not looked at it yet",
}
_PREFIXES = (
    ("ReqNodeNotAvail", "nodes it needs are down, drained or reserved (for maintenance, often)"),
    ("Nodes_required_for_job_are_DOWN", "nodes it needs are down or drained"),
    ("Nodes required for job are DOWN", "nodes it needs are down or drained"),
    ("QOSMaxWall", "its time limit is over what its QOS allows, so it will never start: set slurm.time"),
    ("QOSMaxJobsPerUser", "you have as many running jobs as your QOS allows; it starts when one ends"),
    ("QOSMax", "it would go over a limit of its QOS for one job or user"),
    ("QOSGrp", "everybody in its QOS together is at the limit; it starts when others end"),
    ("QOSMin", "it asks for less than its QOS wants"),
    ("QOS", "a limit of its QOS holds it back"),
    ("AssocGrp", "your account together is at its limit (GPUs, hours or jobs); it starts when other jobs end"),
    ("AssocMaxWall", "its time limit is over what your account allows, so it will never start: set slurm.time"),
    ("AssocMax", "it would go over a limit of your account for one job or user"),
    ("Assoc", "a limit of your account holds it back"),
    ("MaxJobsPer", "you have as many jobs as you may; it starts when one ends"),
    ("MaxGRESPer", "it would go over the GPUs you may use at once"),
    ("MaxMemPerLimit", "it asks for more memory than the partition allows"),
    ("JobArrayTaskLimit", "as many tasks of its array run as were allowed"),
    ("BurstBuffer", "its data is being staged"),
)
_ENDED = {
    "NonZeroExitCode": "a rank ended with an error; its log says why",
    "RaisedSignal": "a rank was killed by a signal",
    "JobLaunchFailure": "Slurm could not start it: is the run folder visible from the compute nodes?",
    "OutOfMemory": "it needs more host memory: set slurm.mem",
    "TimeLimit": "it reached its time limit: set a longer slurm.time, or save more often",
}


def state_words(state: str, job_id: str | None) -> str:
    """What a Slurm state means, as the end of a sentence that begins with "the job"."""
    return _STATES.get(state, f"is in state {state}").format(job_id=job_id)


def reason_words(state: str, reason: str | None, job_id: str | None) -> str | None:
    """What Slurm's reason means; None where it says nothing that the state does not."""
    if not reason or (reason in ("None", "(null)") and state != "PENDING"):
        return None
    if state != "PENDING":
        return _ENDED.get(reason.split(",")[0])
    words = _PENDING.get(reason.split(",")[0])
    if words is None:
        words = next((text for start, text in _PREFIXES if reason.startswith(start)), None)
    return None if words is None else words.format(job_id=job_id)


def never_starts(reason: str | None) -> bool:
    """Whether a job that waits for this reason waits for ever, until somebody changes it."""
    words = (reason or "").split(",")[0]
    texts = [_PENDING.get(words), *(text for start, text in _PREFIXES if words.startswith(start))]
    known = next((text for text in texts if text), "")
    return "never start" in known or "can never give" in known or "is not valid" in known
