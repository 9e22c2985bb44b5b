/* Coding in what every processor has. */
#define APPEND append_portable
#include "append_body.h"
