"""Models that are asked for text: in memory, behind an OpenAI-compatible endpoint, or recorded in a file.

A teacher is a function from a `Request` to a `Reply`. `collect` asks many requests and writes each answer down as it
comes, so that an interrupted collection goes on where it stopped and no answer is paid for twice.
"""

from penjing.teachers.base import Reply, Request, Teacher
from penjing.teachers.collection import collect, read_collection
from penjing.teachers.endpoint import Endpoint
from penjing.teachers.local import LocalTeacher
from penjing.teachers.recorded import RecordedTeacher

__all__ = [
    "Endpoint",
    "LocalTeacher",
    "RecordedTeacher",
    "Reply",
    "Request",
    "Teacher",
    "collect",
    "read_collection",
]
