/* Attention in what every processor has. */
#define ATTEND attend_portable
#include "attend_body.h"
