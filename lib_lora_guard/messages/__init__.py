"""Sentences for users, in every language of the catalogue. Imports no other part of LoRA Guard, so that errors can use
it.
"""

from .message import Joined as Joined
from .message import Message as Message
from .message import about as about
from .message import in_language as in_language
from .message import message_of as message_of
from .message import reason as reason
from .message import say as say
from .message import with_error as with_error
from .message import without as without
