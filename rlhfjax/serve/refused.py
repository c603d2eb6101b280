"""A request that is not answered: why, as a status of HTTP and one line."""

from rlhfjax.errors import UserError


class Refused(UserError):
    """An error object of OpenAI's API.

    Args:
      status: of HTTP, 400 to 599.
      message: one line for people.
      code: a word for programs, such as "context_length_exceeded".
      param: the field of the request that is wrong.
      seconds: after which to try again; None: never.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        seconds: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {} if seconds is None else {"Retry-After": str(seconds)}
